"""Two ranks are one batch where padding and numbers of regions differ between them (D26)."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils import comm

from kd_det.features.classes import match_classes
from kd_det.features.context import StepContext
from kd_det.features.region_branches import BranchRegions
from kd_det.features.regions import RegionOutputs, RegionTargets
from kd_det.losses import (
    BoundedRegressionLoss,
    CrossKDLoss,
    DenseSoftTargetLoss,
    DISTLoss,
    DKDLoss,
    KeypointSoftTargetLoss,
    MaskSoftTargetLoss,
    RPNSoftTargetLoss,
    SoftTargetLoss,
)
from tests.engine.test_distributed import compare_halves_with_whole, on_two_ranks
from tests.losses.test_dense_soft_target import detector
from tests.tiny import batch, distillation_cfg, tiny_cfg

CASES = {
    "PKD": {},
    "CWD": {},
    "FGD": {},
    "MGD": {"KD__MGD__MASK_RATIO": 0.0},
    "ReviewKD": {"KD__REVIEW_KD__CONNECTOR_NORM": "", "KD__REVIEW_KD__MID_CHANNELS": 8},
    "FSP": {},
    "PKD of boxes": {"KD__PKD__REGIONS": "boxes"},
    "Hint of both": {"KD__HINT__REGIONS": "foreground_background"},
}


@pytest.mark.parametrize("case", CASES)
def test_padded_images(tmp_path, case):
    opts = {"MODEL__RESNETS__NORM": "FrozenBN", **CASES[case]}
    cfg = distillation_cfg(tmp_path, case.split()[0], teacher=tiny_cfg(depth=50, width=8), **opts)
    # Every rank's canvas is that of the whole batch, and the second rank has less image on it.
    compare_halves_with_whole(tmp_path, cfg, batch(sizes=((64, 96), (56, 96), (64, 96), (32, 48))))


def share_of_seven() -> slice:
    return {1: slice(0, 7), 2: slice(0, 1) if comm.get_rank() == 0 else slice(1, 7)}[comm.get_world_size()]


class Regions(StepContext):
    """The regions of this rank: one of seven on the first, six on the second."""

    def __init__(self):
        super().__init__([(64, 64)], (64, 64))
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(7, 4, generator=generator) for _ in range(2))
        classes = torch.tensor([0, 3, 2, 3, 1, 0, 3])
        boxes = torch.tensor([0.0, 0.0, 16.0, 16.0]).expand(7, 4)
        transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
        truth = transform.apply_deltas(torch.randn(7, 4, generator=generator), boxes)
        mine = share_of_seven()
        self.student = student[mine].requires_grad_()
        self.outputs = [RegionOutputs(x, x, x) for x in (self.student, teacher[mine])]
        self.targets = RegionTargets(classes[mine], classes[mine] < 3, boxes[mine], truth[mine], transform)

    def region_pairs(self):
        return [tuple(self.outputs)]

    def region_targets(self, stage):
        return self.targets

    def teacher_units(self, stage):
        return [1.0] * 4


class Masks(StepContext):
    """Seven foreground regions likewise, with masks of three classes, or three keypoints of which some do not count."""

    def __init__(self):
        super().__init__([(64, 64)], (64, 64))
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(7, 3, 4, 4, generator=generator) for _ in range(2))
        points = torch.rand(7, 3, 3, generator=generator) * torch.tensor([20.0, 20.0, 3.0])
        instances = Instances((64, 64), gt_classes=torch.tensor([0, 1, 2, 0, 1, 0, 2]), gt_keypoints=Keypoints(points))
        instances.proposal_boxes = Boxes(torch.tensor([[0.0, 0.0, 16.0, 16.0]]).expand(7, 4))
        mine = share_of_seven()
        self.student, self.teacher = student[mine].requires_grad_(), teacher[mine]
        self.regions = BranchRegions([instances[mine]], self.student)

    def branch_pair(self, name):
        return self.regions, self.teacher


def run(cls, context=Regions, class_map=()):
    regions, module = context(), cls()
    if class_map:
        module.classes = match_classes(3, 3, class_map=class_map)
    loss = module([], [], regions)
    loss.backward()
    return {"loss": loss.detach(), "gradient": regions.student.grad}


# The first rank's one region is of a class that the teacher does not know.
SHARED = [[1, 0], [2, 2]]


@pytest.mark.parametrize(
    "case",
    [
        *((cls, Regions, []) for cls in (DKDLoss, DISTLoss, SoftTargetLoss, BoundedRegressionLoss)),
        *((cls, Regions, SHARED) for cls in (DKDLoss, SoftTargetLoss, BoundedRegressionLoss)),
        *((MaskSoftTargetLoss, Masks, classes) for classes in ([], SHARED)),
        (KeypointSoftTargetLoss, Masks, []),
    ],
    ids=lambda case: f"{case[0].__name__} {case[2]}",
)
def test_unequal_numbers_of_regions(tmp_path, case):
    whole, ranks = run(*case), on_two_ranks(tmp_path, run, *case)
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, whole["loss"])
    # DDP halves the sum of both ranks' gradients.
    torch.testing.assert_close(torch.cat([rank["gradient"] for rank in ranks]) / 2, whole["gradient"])


def run_dense(kind, make, sizes):
    """The loss and its gradient, of random maps of as many images as this rank has; of images alike, the same maps."""
    loss, student = make(), detector(kind, seed=0)
    loss.connect(student, student)
    mine = slice(None) if comm.get_world_size() == 1 else slice(comm.get_rank(), comm.get_rank() + 1)
    generator = torch.Generator().manual_seed(0)

    def maps(taps):
        channels = [student.get_submodule(tap).out_channels for tap in taps]
        shapes = [(len(set(sizes)), c, *size) for c in channels for size in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))]
        return [torch.randn(shape, generator=generator).expand(2, -1, -1, -1)[mine] for shape in shapes]

    own, theirs = [x.clone().requires_grad_() for x in maps(loss.student_taps)], maps(loss.teacher_taps)
    value = loss(own, theirs, StepContext(sizes[mine], (64, 96), teacher=SimpleNamespace(model=student)))
    value.backward()
    return {"loss": value.detach(), "gradient": [x.grad for x in own]}


UNEQUAL, ALIKE = [(64, 96), (40, 56)], [(40, 56), (40, 56)]


@pytest.mark.parametrize(
    "kind, make, sizes",
    [
        ("RetinaNet", DenseSoftTargetLoss, UNEQUAL),
        ("FCOS", DenseSoftTargetLoss, UNEQUAL),
        ("RPN", RPNSoftTargetLoss, UNEQUAL),
        # Features are aligned by the statistics of each rank's own images.
        ("RetinaNet", partial(CrossKDLoss, cut=1), ALIKE),
    ],
)
def test_confident_anchors(tmp_path, kind, make, sizes):
    whole, ranks = run_dense(kind, make, sizes), on_two_ranks(tmp_path, run_dense, kind, make, sizes)
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, whole["loss"])
    halves = [torch.cat(pair) / 2 for pair in zip(*(rank["gradient"] for rank in ranks))]
    for half, expected in zip(halves, whole["gradient"]):
        torch.testing.assert_close(half, expected)
