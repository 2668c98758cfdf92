"""Which heads are read, and what is said of two that cannot be compared."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import BufferList
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K

from kd_det.features.context import StepContext
from kd_det.features.dense_heads import check_same_anchors, dense_head, per_anchor, rpn_head, valid_anchors
from tests.tiny import tiny_cfg, tiny_fcos, tiny_retinanet_cfg

SIZES = [[32, 40.3175, 50.7968]]


def retinanet(**opts):
    return dense_head(build_model(tiny_retinanet_cfg(**opts)), side="student")


def rpn(**opts):
    return rpn_head(build_model(tiny_cfg(**opts)), side="student")


def test_what_is_read():
    found = retinanet()
    assert found.taps == ("head.cls_score", "head.bbox_pred")
    assert (found.num_classes, found.num_anchors, found.strides) == (3, 3, [8, 16, 32, 64, 128])
    assert dense_head(tiny_fcos(), side="student").taps[2] == "head.ctrness"
    found = rpn()
    assert found.num_classes == 1 and found.strides == [4, 8, 16, 32, 64]
    assert found.taps[0] == "proposal_generator.rpn_head.objectness_logits"


def test_the_first_anchors_are_the_generators():
    for offset in (0.0, 0.5):
        cfg = tiny_cfg(MODEL__ANCHOR_GENERATOR__OFFSET=offset)
        generator = build_model(cfg).proposal_generator.anchor_generator
        expected = generator([torch.zeros(1, 1, 2, 3)] * 5)
        for found, boxes in zip(rpn(MODEL__ANCHOR_GENERATOR__OFFSET=offset).anchors, expected):
            torch.testing.assert_close(found, boxes.tensor[: len(found)])


def test_anchors_are_in_detectron2s_order():
    levels = [torch.randn(2, 3 * 5, 4, 6), torch.randn(2, 3 * 5, 2, 3)]
    found = per_anchor(levels, 3)
    expected = torch.cat([permute_to_N_HWA_K(x, 5) for x in levels], dim=1)  # (N, H W A, K)
    assert found.shape == (6, 5, 30)
    # From (N A, K, P) to (N, P A, K).
    assert torch.equal(found.view(2, 3, 5, 30).permute(0, 3, 1, 2).reshape(2, 90, 5), expected)


def test_padding_of_every_anchor():
    levels = [torch.zeros(2, 6, 8, 12), torch.zeros(2, 6, 4, 6), torch.zeros(2, 6, 1, 1)]
    context = StepContext([(64, 96), (48, 64)], (64, 96))
    found = valid_anchors(levels, 3, context)
    assert found.shape == (6, 1, 96 + 24 + 1) and found.dtype == torch.bool
    counts = found.sum((1, 2)).tolist()
    assert counts == [121] * 3 + [6 * 8 + 3 * 4 + 1] * 3
    assert valid_anchors(levels, 3, StepContext([(64, 96)] * 2, (64, 96))) is None


def test_rounded_sizes_are_the_same_anchors():
    exact = [[32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)]]
    check_same_anchors(*(retinanet(MODEL__ANCHOR_GENERATOR__SIZES=sizes) for sizes in (SIZES, exact)))


def with_transform(head, transform):
    head = copy.copy(head)
    object.__setattr__(head, "transform", transform)
    return head


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (
            lambda: retinanet(),
            lambda: dense_head(tiny_fcos(), side="teacher"),
            "is a RetinaNetHead that predicts cls_score, bbox_pred, with .*, the teacher's a FCOSHead that predicts "
            "cls_score, bbox_pred, ctrness, with Box2BoxTransformLinear \\(normalize_by_size True\\)",
        ),
        (
            lambda: retinanet(),
            lambda: retinanet(MODEL__RETINANET__BBOX_REG_WEIGHTS=(10.0, 10.0, 5.0, 5.0)),
            r"weights \(1.0, 1.0, 1.0, 1.0\)\), the teacher's .* \(weights \(10.0, 10.0, 5.0, 5.0\)",
        ),
        (
            lambda: retinanet(),
            lambda: retinanet(MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[[1.0]]),
            "anchors of level 0 are 11.31x5.657, 8x8, 5.657x11.31 at stride 8, the teacher's 8x8 at stride 8",
        ),
        (
            lambda: rpn(),
            lambda: rpn(MODEL__ANCHOR_GENERATOR__SIZES=[[8], [16], [32], [64], [256]]),
            "anchors of level 4 are .*128x128.* at stride 64, the teacher's .*256x256",
        ),
        (
            lambda: rpn(),
            lambda: rpn(MODEL__RPN__IN_FEATURES=["p3", "p4"], MODEL__ANCHOR_GENERATOR__SIZES=[[8], [16]]),
            "the student has 5 levels and the teacher 2",
        ),
        (
            lambda: rpn(MODEL__RPN__IN_FEATURES=["p2"], MODEL__ANCHOR_GENERATOR__SIZES=[[8]]),
            lambda: rpn(MODEL__RPN__IN_FEATURES=["p3"], MODEL__ANCHOR_GENERATOR__SIZES=[[8]]),
            "at stride 4, the teacher's .* at stride 8",
        ),
        (
            lambda: rpn(),
            lambda: rpn(MODEL__ANCHOR_GENERATOR__OFFSET=0.5),
            "anchors of level 0",
        ),
        (
            lambda: with_transform(dense_head(tiny_fcos(), side="student"), Box2BoxTransformLinear(False)),
            lambda: dense_head(tiny_fcos(), side="teacher"),
            "normalize_by_size False",
        ),
    ],
)
def test_what_differs_is_said(student, teacher, message):
    with pytest.raises(ValueError, match=message) as e:
        check_same_anchors(student(), teacher())
    assert "\n" not in str(e.value)


def test_networks_without_such_a_head():
    rcnn = build_model(tiny_cfg())
    with pytest.raises(ValueError, match="the teacher GeneralizedRCNN has no dense head, which RetinaNet"):
        dense_head(rcnn, side="teacher")
    with pytest.raises(ValueError, match="the student RetinaNet has no RPN with a StandardRPNHead"):
        rpn_head(build_model(tiny_retinanet_cfg()), side="student")
    rcnn.proposal_generator.anchor_generator.cell_anchors = BufferList([torch.zeros(3, 5)] * 5)
    with pytest.raises(ValueError, match="the student's DefaultAnchorGenerator gives no upright anchors to compare"):
        rpn_head(rcnn, side="student")
