"""Where features count: weights of positions from boxes, by hand and by a definition written position by position."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

from kd_det.features.context import StepContext
from kd_det.features.position_weights import pad_boxes, position_weights
from kd_det.features.regions import SampledRegions
from tests.pretend_accelerator import DEVICE, Accelerator, on_device

CANVAS, SIZE = (32, 48), (4, 6)  # stride 8


def weights(regions, *boxes, size=SIZE, canvas=CANVAS, **kwargs):
    """Of images with these boxes, (N, H, W)."""
    boxes = pad_boxes([torch.tensor(b).view(-1, 4) for b in boxes], torch.device("cpu"))
    return position_weights(regions, boxes, canvas, size, **kwargs)[:, 0]


def test_boxes_by_hand():
    # Columns 1 to 3 (x from 8 to 31.9), row 0 (y from 2 to 8); the second image has none, the third two that overlap.
    found = weights("boxes", [[8.0, 2, 31.9, 8]], [], [[0.0, 0, 16, 16], [8.0, 8, 24, 24]])
    assert found[0].tolist() == [[0, 1, 1, 1, 0, 0]] + 3 * [[0] * 6]
    assert not found[1].any()
    assert found[2].tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0] * 6]


@pytest.mark.parametrize("regions", ["boxes", "gaussian", "proposals"])
def test_a_small_object_has_a_position_at_every_level(regions):
    for size in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1)):
        found = weights(regions, [[17.2, 9.1, 18.9, 10.4]], size=size)[0]
        assert (found > 0).sum() == 1 and found.max() >= math.exp(-1)
        assert divmod(found.argmax().item(), size[1]) == (9 * size[0] // 32, 18 * size[1] // 48)


def test_gaussian_position_by_position():
    boxes = [[3.0, 2, 30, 29], [20.0, 10, 46, 14], [-9.0, 20, 10, 40]]  # two overlap, one reaches beyond the image
    expected = torch.zeros(SIZE)
    for x1, y1, x2, y2 in boxes:
        for i in range(SIZE[0]):
            for j in range(SIZE[1]):
                if i * 8 < y2 and i * 8 + 8 > y1 and j * 8 < x2 and j * 8 + 8 > x1:
                    # 4 pixels are half a position.
                    dy = (i * 8 + 4 - (y1 + y2) / 2) / max((y2 - y1) / 2, 4)
                    dx = (j * 8 + 4 - (x1 + x2) / 2) / max((x2 - x1) / 2, 4)
                    expected[i, j] = max(expected[i, j], math.exp(-(dx * dx + dy * dy) / 2))
    torch.testing.assert_close(weights("gaussian", boxes)[0], expected)


def test_proposals_are_counted():
    found = weights("proposals", [[0.0, 0, 16, 16], [8.0, 8, 24, 24]], [[0.0, 0, 8, 8]] * 3)
    assert found[0, :3, :3].tolist() == [[1, 1, 0], [1, 2, 1], [0, 1, 1]] and found[0].sum() == 8 - 1 + 1
    assert found[1, 0, 0] == 3 and found[1].sum() == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert weights("proposals", [[0.0, 0, 8, 8]] * 511)[0, 0, 0] == 511


class TestForegroundBackground:
    BOX = [[8.0, 0, 24, 8]]  # two positions

    def test_each_part_has_its_share_spread_evenly(self):
        found = weights("foreground_background", self.BOX, foreground_share=0.75)[0]
        assert found[0, 1:3].tolist() == [0.375, 0.375]
        assert found[0, 0] == 0.25 / 22 and found.sum().item() == pytest.approx(1)

    def test_more_objects_do_not_change_the_shares(self):
        found = weights("foreground_background", self.BOX, [*self.BOX, [0.0, 16, 48, 32]], foreground_share=0.75)
        inside = weights("boxes", self.BOX, [*self.BOX, [0.0, 16, 48, 32]]) > 0
        assert (found * inside).sum((1, 2)).tolist() == pytest.approx([0.75, 0.75])

    def test_padding_is_no_background(self):
        valid = torch.ones(1, 1, *SIZE, dtype=torch.bool)
        valid[..., 4:] = False
        found = weights("foreground_background", self.BOX, valid=valid, foreground_share=0.5)[0]
        assert found[0, 0] == 0.5 / 14 and not found[:, 4:].any()

    def test_one_kind_takes_all(self):
        found = weights("foreground_background", [], [[0.0, 0, 48, 32]], foreground_share=0.75)
        for image in found:
            assert (image == image[0, 0]).all() and image[0, 0] > 0

    def test_all_on_the_objects_are_boxes_and_none_without_any(self):
        found = weights("foreground_background", self.BOX, [], foreground_share=1.0)
        assert torch.equal(found * 2, weights("boxes", self.BOX, []))


def batched(*boxes):
    inputs = []
    for b in boxes:
        instances = Instances((32, 48))
        instances.gt_boxes = Boxes(torch.tensor(b).view(-1, 4))
        inputs.append({"instances": instances})
    return inputs


class TestContext:
    def test_levels_and_losses_share_the_boxes_and_the_weights(self):
        context = StepContext([(32, 48)] * 2, CANVAS, batched_inputs=batched([[8.0, 2, 30, 8]] * 3, []))
        map_ = torch.empty(2, 5, *SIZE)
        first = context.position_weights(map_, "boxes", 0.2)
        assert context.position_weights(map_[:, :1], "boxes", 0.2) is first and first.shape == (2, 1, *SIZE)
        context.batched_inputs = None  # the boxes are there
        assert context.position_weights(torch.empty(2, 5, 2, 3), "gaussian", 0.2).shape == (2, 1, 2, 3)

    @pytest.mark.parametrize("regions", ["boxes", "gaussian", "proposals", "foreground_background"])
    def test_the_host_never_waits_and_kernels_are_few(self, regions):
        boxes = [[[8.0, 2, 30, 8]] * 7, [], [[0.0, 0, 8, 8]], [[9.0, 9, 9, 9]] * 3]
        inputs = batched(*boxes)
        with Accelerator() as accelerator:
            sampled = [SampledRegions([Boxes(on_device(x["instances"].gt_boxes.tensor)) for x in inputs], None)]
            context = StepContext([(32, 48), (20, 30)] * 2, CANVAS, batched_inputs=inputs, sampled=sampled)
            map_ = on_device(torch.zeros(4, 5, *SIZE))
            context.valid(map_)
            accelerator.reset()
            found = context.position_weights(map_, regions, 0.2)
        # Pageable memory counts as a wait here; a GPU's copy is made from pinned memory.
        assert sum(accelerator.waits.values()) == (regions != "proposals") and found.device == DEVICE
        assert accelerator.kernels <= 30

    def test_unlabelled_images(self):
        context = StepContext([(32, 48)] * 2, CANVAS, batched_inputs=[*batched([]), {"image": None}])
        with pytest.raises(ValueError, match="needs ground truth: the batch has no 'instances'"):
            context.position_weights(torch.empty(2, 5, *SIZE), "boxes", 0.2)

    def test_proposals_that_were_not_recorded(self):
        with pytest.raises(RuntimeError, match="must declare needs_proposals = True"):
            StepContext([(32, 48)], CANVAS).position_weights(torch.empty(1, 5, *SIZE), "proposals", 0.2)
