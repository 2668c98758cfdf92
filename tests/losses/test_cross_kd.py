"""CrossKD: the student's features through the rest of the teacher's frozen head."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kd_det.losses import CrossKDLoss, align_scale, confidence_weights, dense_box_loss, quality_focal_loss
from tests.losses.test_dense_soft_target import detector, distil, randn

KINDS = ("RetinaNet", "FCOS")
CONVS = {"RetinaNet": "MODEL__RETINANET__NUM_CONVS", "FCOS": "num_convs"}


def heads(kind, *, convs=(2, 2), width=8, **opts):
    """Student and teacher, whose numbers of convolutions are ``convs``."""
    opts = {"fpn": width, **opts}
    return (
        detector(kind, seed=0, **{CONVS[kind]: convs[0]}, **opts),
        detector(kind, seed=1, depth=50, width=8, **{CONVS[kind]: convs[1]}, **opts),
    )


class TestQualityFocalLoss:
    def test_value_and_gradient_are_the_definition(self):
        student, teacher = randn(2, 3, 4).requires_grad_(), randn(2, 3, 4, seed=1)
        q, p = student.sigmoid(), teacher.sigmoid()
        expected = -((p - q).abs() * (p * q.log() + (1 - p) * (1 - q).log())).sum()
        found = quality_focal_loss(student, teacher)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])
        assert torch.autograd.gradcheck(lambda s: quality_focal_loss(s, teacher), student)
        assert quality_focal_loss(teacher, teacher) == 0

    def test_padding_extremes_and_wrong_shapes(self):
        student, teacher, valid = randn(2, 3, 4), randn(2, 3, 4, seed=1), torch.arange(4).expand(2, 1, 4) < 3
        padded = student.masked_fill(~valid, float("nan")).requires_grad_()
        found = quality_focal_loss(padded, teacher.masked_fill(~valid, 1e9), valid=valid)
        torch.testing.assert_close(found, quality_focal_loss(student[..., :3], teacher[..., :3]))
        assert not torch.autograd.grad(found, padded)[0][..., 3:].any()
        extreme = (1e4 * randn(2, 3, 4)).requires_grad_()
        found = quality_focal_loss(extreme, -1e4 * teacher)
        assert found.isfinite() and torch.autograd.grad(found, extreme)[0].isfinite().all()
        empty = torch.zeros(0, 3, 4, requires_grad=True)
        quality_focal_loss(empty, torch.zeros(0, 3, 4)).backward()
        assert empty.grad.shape == empty.shape
        with pytest.raises(ValueError, match=r"the same classes, found shapes \(2, 3, 4\) and \(2, 4, 4\)"):
            quality_focal_loss(student, randn(2, 4, 4))


class TestAlignScale:
    def test_is_the_published_one_on_whole_images(self):
        student, teacher = 3 + 2 * randn(2, 5, 4, 6), randn(2, 5, 4, 6, seed=1) - 1

        def rows(x):
            return x.permute(1, 0, 2, 3).reshape(5, -1)

        s, t = rows(student), rows(teacher)
        expected = (s - s.mean(1, keepdim=True)) / (s.std(1, keepdim=True) + 1e-6)
        expected = expected * t.std(1, keepdim=True) + t.mean(1, keepdim=True)
        torch.testing.assert_close(rows(align_scale(student, teacher)), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(align_scale(student, student), student, rtol=1e-4, atol=1e-4)

    def test_padding_is_not_measured(self):
        student, teacher = randn(2, 3, 4, 6), randn(2, 3, 4, 6, seed=1)
        valid = torch.ones(2, 1, 4, 6, dtype=torch.bool)
        valid[:, :, :, 4:] = False
        expected = align_scale(student[..., :4], teacher[..., :4])
        found = align_scale(student.masked_fill(~valid, 1e6), teacher.masked_fill(~valid, -1e6), valid=valid)
        torch.testing.assert_close(found[..., :4], expected)

    def test_gradient_and_constant_channels(self):
        student, teacher = randn(2, 2, 2, 3).requires_grad_(), randn(2, 2, 2, 3, seed=1)
        valid = torch.ones(2, 1, 2, 3, dtype=torch.bool)
        valid[1, :, :, 2:] = False
        for mask in (None, valid):
            assert torch.autograd.gradcheck(lambda s, m=mask: align_scale(s, teacher, valid=m), student)
        one = torch.full((1, 2, 1, 1), 3.0, requires_grad=True)
        found = align_scale(one, torch.full((1, 2, 1, 1), 5.0))
        assert found.eq(5).all() and not torch.autograd.grad(found.sum(), one)[0].any()

    def test_other_channels(self):
        with pytest.raises(ValueError, match="align_scale: needs as many student as teacher channels, found 2 and 3"):
            align_scale(randn(1, 2, 2, 2), randn(1, 3, 2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_is_its_definition(kind):
    student, teacher = heads(kind)
    features = []
    student.head.register_forward_hook(lambda m, args, out: features.extend(args[0]))
    value, own, theirs, context = distil(CrossKDLoss(cut=1, box_weight=0.7), student, teacher)
    levels = len(features)
    total = weight = 0.0
    for level, x in enumerate(features):
        assert torch.equal(own[level], student.head.cls_subnet[0](x))
        assert torch.equal(own[levels + level], student.head.bbox_subnet[0](x))
        aligned = [
            F.relu(align_scale(s, t, valid=context.valid(s)))
            for s, t in zip(own[level::levels], theirs[level : 2 * levels : levels])
        ]
        logits = teacher.head.cls_score(F.relu(teacher.head.cls_subnet[2](aligned[0])))
        deltas = teacher.head.bbox_pred(F.relu(teacher.head.bbox_subnet[2](aligned[1])))
        t_logits, t_deltas = theirs[2 * levels + level], theirs[3 * levels + level]
        anchors = logits.shape[1] // 3
        s_logits, t_logits = (y.unflatten(1, (anchors, 3)).flatten(3).flatten(0, 1) for y in (logits, t_logits))
        s_deltas, t_deltas = (y.unflatten(1, (anchors, 4)).flatten(3).flatten(0, 1) for y in (deltas, t_deltas))
        valid = context.valid(x)
        if valid is not None:
            valid = valid.flatten(2).repeat_interleave(anchors, dim=0)
        weights = confidence_weights(t_logits, valid=valid)
        options = {"kind": "giou", "transform": teacher.box2box_transform}
        boxes = dense_box_loss(s_deltas, t_deltas, weights, **options) * weights.sum().clamp(min=1)
        total = total + quality_focal_loss(s_logits, t_logits, valid=valid) + 0.7 * boxes
        weight = weight + weights.sum()
    assert weight > 1 and value.item() == pytest.approx((total / weight).item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_students_first_convolutions_learn(kind):
    student, teacher = heads(kind)
    value, *_ = distil(CrossKDLoss(cut=1), student, teacher)
    value.backward()
    taught = [student.backbone, student.head.cls_subnet[0], student.head.bbox_subnet[0]]
    assert all(any(p.grad is not None and p.grad.any() for p in part.parameters()) for part in taught)
    left = [student.head.cls_subnet[2], student.head.bbox_subnet[2], student.head.cls_score, student.head.bbox_pred]
    assert all(p.grad is None for part in left for p in part.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_equal_networks_agree(kind):
    student, _ = heads(kind)
    value, *_ = distil(CrossKDLoss(cut=2), student, copy.deepcopy(student))
    assert value < 1e-3


@pytest.mark.parametrize("norm", ["GN", "BN"])
def test_heads_with_norms_are_cut_in_front_of_the_relu(norm):
    student, teacher = heads("RetinaNet", width=32, MODEL__RETINANET__NORM=norm)
    value, *_ = distil(loss := CrossKDLoss(cut=2), student, teacher)
    assert loss.student_taps == ("head.cls_subnet.4", "head.bbox_subnet.4")
    assert type(student.head.cls_subnet[5]) is torch.nn.ReLU and value > 0


def test_heads_of_other_depths():
    student, teacher = heads("FCOS", convs=(1, 3))
    value, *_ = distil(CrossKDLoss(cut=1), student, teacher)
    assert value > 0


def test_heads_that_cannot_be_crossed():
    student, teacher = heads("RetinaNet")
    narrow = detector("RetinaNet", seed=0, fpn=4, MODEL__RETINANET__NUM_CONVS=2)
    with pytest.raises(ValueError, match=r"equal channels: .* the student has \[4, 4\] and the teacher \[8, 8\]"):
        distil(CrossKDLoss(cut=1), narrow, teacher)
    with pytest.raises(ValueError, match=r"behind convolution 3 .* the student's RetinaNetHead.cls_subnet has 2\."):
        distil(CrossKDLoss(), student, teacher)
