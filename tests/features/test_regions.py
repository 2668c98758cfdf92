import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou

from kd_det.features.context import StepContext, valid_mask
from kd_det.features.regions import RegionHead, RegionOutputs, RegionTaps, SampledRegions
from tests.tiny import NUM_CLASSES, batch, tiny_cfg


class TestValidMask:
    def test_by_hand(self):
        # A canvas of 64 x 96 at stride 16: 4 x 6 positions. An image of 33 x 49 reaches into the third row (pixels 32
        # to 47) and the fourth column (48 to 63).
        mask = valid_mask([(64, 96), (33, 49)], (64, 96), (4, 6))
        assert mask.shape == (2, 1, 4, 6)
        assert mask[0].all()
        expected = torch.zeros(4, 6, dtype=torch.bool)
        expected[:3, :4] = True
        assert torch.equal(mask[1, 0], expected)

    def test_an_image_that_ends_with_a_cell(self):
        assert valid_mask([(32, 48)], (64, 96), (4, 6))[0, 0].sum() == 2 * 3

    def test_a_map_that_does_not_divide_the_canvas(self):
        # p6 of a canvas of 96 rows: 2 positions of 48 pixels; an image of 49 rows reaches the second.
        assert valid_mask([(49, 96), (48, 96)], (96, 96), (2, 2))[:, 0, :, 0].tolist() == [[True, True], [True, False]]

    def test_none_where_everything_is_valid(self):
        context = StepContext([(64, 96), (64, 96)], (64, 96))
        assert context.valid(torch.zeros(2, 1, 8, 12)) is None

    def test_made_once_a_size(self):
        context = StepContext([(64, 96), (32, 96)], (64, 96))
        assert context.valid(torch.zeros(2, 1, 8, 12)) is context.valid(torch.zeros(2, 7, 8, 12))
        assert context.valid(torch.zeros(2, 1, 4, 6)).shape == (2, 1, 4, 6)


def cascade(**opts):
    return tiny_cfg(MODEL__ROI_HEADS__NAME="CascadeROIHeads", MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True, **opts)


BOXES = [Boxes(torch.tensor([[4.0, 4, 40, 30], [0, 0, 20, 60]])), Boxes(torch.tensor([[10.0, 8, 50, 40]]))]


class TestRegionHead:
    @pytest.mark.parametrize("make, stages", [(tiny_cfg, 1), (cascade, 3)])
    def test_says_what_the_roi_heads_say(self, make, stages):
        model = build_model(make()).eval()
        head = RegionHead(model.roi_heads)
        features = model.backbone(model.preprocess_image(batch()).tensor)
        assert (head.num_stages, head.num_classes) == (stages, NUM_CLASSES)
        for stage in range(stages):
            out = head(features, BOXES, stage)
            pooled = model.roi_heads.box_pooler([features[f] for f in ("p2", "p3", "p4", "p5")], BOXES)
            box_head, predictor = model.roi_heads.box_head, model.roi_heads.box_predictor
            if stages > 1:
                box_head, predictor = box_head[stage], predictor[stage]
            logits, deltas = predictor(box_head(pooled))
            assert torch.equal(out.features, pooled)
            assert torch.equal(out.logits, logits) and torch.equal(out.deltas, deltas)

    def test_the_last_stage_answers_for_later_ones(self):
        model = build_model(tiny_cfg()).eval()
        head = RegionHead(model.roi_heads)
        features = model.backbone(model.preprocess_image(batch()).tensor)
        assert torch.equal(head(features, BOXES, 2).logits, head(features, BOXES, 0).logits)

    def test_other_roi_heads_are_named(self):
        with pytest.raises(ValueError, match="the teacher has Linear"):
            RegionHead(torch.nn.Linear(1, 1), side="teacher")


class TestRegionTaps:
    @pytest.mark.parametrize("make, stages", [(tiny_cfg, 1), (cascade, 3)])
    def test_records_the_samples_of_the_students_own_forward(self, make, stages):
        model = build_model(make()).train()
        taps = RegionTaps(RegionHead(model.roi_heads))
        calls = []
        model.roi_heads.box_pooler.register_forward_hook(lambda *a: calls.append(1))
        with taps.recording():
            model(batch())
        recorded = taps.pop()
        assert len(recorded) == stages == len(calls)  # no second pass
        for boxes, outputs in ((regions.boxes, regions.outputs) for regions in recorded):
            count = sum(len(b) for b in boxes)
            assert len(boxes) == 2 and outputs.logits.shape == (count, NUM_CLASSES + 1)
            assert outputs.features.shape == (count, 8, 3, 3) and outputs.logits.requires_grad

    def test_reading_empties_and_exceptions_clear(self):
        model = build_model(tiny_cfg()).train()
        taps = RegionTaps(RegionHead(model.roi_heads))
        with pytest.raises(ZeroDivisionError), taps.recording():
            model(batch())
            _ = 1 / 0
        with pytest.raises(RuntimeError, match="expected the student's box head to run 1 times .* found 0"):
            taps.pop()
        assert not model.roi_heads.box_pooler._forward_hooks

    def test_regions_that_were_not_recorded(self):
        with pytest.raises(RuntimeError, match="needs_regions = True"):
            StepContext([(64, 96)], (64, 96)).region_pairs()


def test_regions_are_matched_as_by_the_heads_own_matcher():
    opts = {"MODEL__ROI_HEADS__NAME": "CascadeROIHeads", "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}
    heads = build_model(tiny_cfg(**opts)).roi_heads
    truth = [x["instances"] for x in batch(((64, 96), (48, 64), (64, 64)))]
    shifted = [torch.cat([t.gt_boxes.tensor + 3 * torch.randn(len(t), 4) for _ in range(6)]) for t in truth]
    boxes = [Boxes(x) for x in shifted]
    truth[1] = truth[1][:0]
    outputs = RegionOutputs(*torch.empty(3, 0))
    for stage, matcher in enumerate(heads.proposal_matchers):
        targets = RegionHead(heads).label(SampledRegions(boxes, outputs), truth, stage)
        for t, b, found in zip(truth, boxes, targets.classes.split(18)):
            expected = torch.full((18,), NUM_CLASSES)
            if len(t):
                index, label = matcher(pairwise_iou(t.gt_boxes, b))
                expected = torch.where(label == 1, t.gt_classes[index], NUM_CLASSES)
            assert torch.equal(found, expected)
        assert targets.foreground.any()
