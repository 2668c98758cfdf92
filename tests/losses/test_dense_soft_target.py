"""What RetinaNet, FCOS and RPNs predict where the teacher is confident: classes, boxes and centerness."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from fvcore.nn import giou_loss

from kd_det import Distiller
from kd_det.losses import (
    CrossKDLoss,
    DenseSoftTargetLoss,
    RPNSoftTargetLoss,
    SoftTargetLoss,
    binary_soft_target_loss,
    confidence_weights,
    dense_box_loss,
    dense_class_loss,
)
from tests.tiny import batch, distillation_cfg, tiny_cfg, tiny_fcos, tiny_retinanet_cfg

TRANSFORMS = {
    "RetinaNet": Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
    "R-CNN": Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
    "FCOS": Box2BoxTransformLinear(True),
    "FCOS in pixels": Box2BoxTransformLinear(False),
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestConfidence:
    def test_by_hand(self):
        logits = torch.tensor([[[0.0, 3.0], [-1.0, 1.0]]]).clamp(min=0.5).log()  # probabilities 1/3 or 3/4, 1/3 or 1/2
        expected = torch.tensor([[[1 / 3, 0.75]]])
        torch.testing.assert_close(confidence_weights(logits, power=1.0), expected)
        torch.testing.assert_close(confidence_weights(logits), expected**2)
        # A centerness of 1/2: the score is the square root of half the probability.
        centerness = torch.zeros(1, 1, 2)
        torch.testing.assert_close(confidence_weights(logits, centerness=centerness), expected / 2)

    def test_what_does_not_count(self):
        logits, valid = randn(2, 3, 4).requires_grad_(), torch.tensor([True, False, True, True]).expand(2, 1, 4)
        for power in (0.0, 1.0, 2.0):
            weights = confidence_weights(logits, power=power, valid=valid)
            assert not weights.requires_grad and ((weights > 0) == valid).all() and (weights <= 1).all()
        assert torch.equal(confidence_weights(logits, power=0.0), torch.ones(2, 1, 4))


class TestClasses:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_is_the_weighted_mean_of_the_soft_targets_of_each_anchor(self, temperature):
        student, teacher, weights = randn(2, 3, 4).requires_grad_(), 3 * randn(2, 3, 4, seed=1), 3 * rand(2, 1, 4)
        anchors = zip(*(x.mT.flatten(0, 1) for x in (student, teacher)))
        each = torch.stack([binary_soft_target_loss(s[None], t[None], temperature=temperature) for s, t in anchors])
        expected = (weights.flatten() * each).sum() / weights.sum()
        found = dense_class_loss(student, teacher, weights, temperature=temperature)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(2 * found, student), torch.autograd.grad(2 * expected, student))
        # A teacher that sees less than one object teaches less.
        less = dense_class_loss(student, teacher, weights / weights.sum() / 4, temperature=temperature)
        torch.testing.assert_close(less, expected.detach() / 4)
        assert torch.autograd.gradcheck(lambda s: dense_class_loss(s, teacher, weights), student)
        assert dense_class_loss(student, student, weights) == 0

    def test_digits_of_confident_predictions(self):
        student, teacher = 10 * randn(1, 50, 20), 10 * randn(1, 50, 20, seed=1)
        for near in (student, student + 1e-3 * teacher):
            exact = binary_soft_target_loss(near, teacher, temperature=1.0)
            found = dense_class_loss(near.float(), teacher.float(), torch.ones(1, 1, 20))
            assert found.item() == pytest.approx(exact.item(), rel=1e-5)

    def test_what_has_no_weight_never_counts_and_extremes_are_finite(self):
        student, teacher, weights = randn(2, 3, 5), randn(2, 3, 5, seed=1), rand(2, 1, 5)
        weights[:, :, 3:] = 0
        expected = dense_class_loss(student[..., :3], teacher[..., :3], weights[..., :3])
        student[..., 3:], teacher[..., 3:] = float("nan"), 1e30
        student.requires_grad_()
        found = dense_class_loss(student, teacher, weights)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found, student)
        assert gradient.isfinite().all() and not gradient[..., 3:].any()
        extreme = (1e4 * randn(2, 3, 5).float()).requires_grad_()
        found = dense_class_loss(extreme, -1e4 * randn(2, 3, 5).float(), torch.ones(2, 1, 5))
        assert found.isfinite() and torch.autograd.grad(found, extreme)[0].isfinite().all()

    def test_empty_and_wrong_inputs(self):
        empty = torch.zeros(0, 3, 5, requires_grad=True)
        loss = dense_class_loss(empty, torch.zeros(0, 3, 5), torch.zeros(0, 1, 5))
        loss.backward()
        assert loss == 0 and empty.grad.shape == (0, 3, 5)
        with pytest.raises(ValueError, match=r"found shapes \(2, 3, 4\), \(2, 3, 4\) and \(2, 4\)"):
            dense_class_loss(randn(2, 3, 4), randn(2, 3, 4), rand(2, 4))
        with pytest.raises(ValueError, match="temperature must be a positive number, found 0"):
            dense_class_loss(randn(2, 3, 4), randn(2, 3, 4), rand(2, 1, 4), temperature=0)


class TestBoxes:
    def test_by_hand(self):
        student, teacher = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
        # Boxes of the anchor's size: moved by half of it (a third in common), and by two of it (a gap of one between).
        teacher[0, 0] = torch.tensor([0.5, 2.0])
        transform = TRANSFORMS["RetinaNet"]
        for weights, giou, l1 in (
            ([1.0, 0.0], 1 - 1 / 3, 0.5),
            ([0.0, 1.0], 1 + 1 / 3, 2.0),
            ([1.0, 3.0], (2 / 3 + 4) / 4, (0.5 + 6) / 4),
        ):
            weights = torch.tensor([[weights]])
            found = dense_box_loss(student, teacher, weights, kind="giou", transform=transform).item()
            assert found == pytest.approx(giou)
            assert dense_box_loss(student, teacher, weights).item() == pytest.approx(l1)

    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_giou_is_that_of_the_boxes_at_any_anchor(self, name):
        transform, scale = TRANSFORMS[name], 5.0 if name == "R-CNN" else 1.0
        student, teacher = (scale * randn(1, 4, 9, seed=seed) for seed in (0, 1))
        if "FCOS" in name:
            student, teacher = student.abs(), teacher.abs()
        weights = 4 * rand(1, 1, 9)
        corner, size = 100 * rand(9, 2), 8 + 50 * rand(9, 1 if "FCOS" in name else 2).expand(-1, 2)
        anchors = torch.cat([corner, corner + size], dim=1)
        boxes = [transform.apply_deltas(x[0].T.contiguous(), anchors) for x in (student, teacher)]
        expected = (giou_loss(*boxes) * weights[0, 0]).sum() / weights.sum()
        found = dense_box_loss(student, teacher, weights, kind="giou", transform=transform)
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5, check_dtype=False)

    @pytest.mark.parametrize("kind", ["l1", "giou"])
    def test_gradients(self, kind):
        # Detectron2 decodes with its other transform in float32 only.
        student, teacher, weights = rand(2, 4, 5).add(0.1).requires_grad_(), rand(2, 4, 5, seed=1), rand(2, 1, 5)
        options = {"kind": kind, "transform": TRANSFORMS["FCOS"]}
        assert torch.autograd.gradcheck(lambda s: dense_box_loss(s, teacher, weights, **options), student)
        assert dense_box_loss(student, student, weights, **options).abs() < 1e-6

    @pytest.mark.parametrize("kind", ["l1", "giou"])
    @pytest.mark.parametrize("name", ["RetinaNet", "FCOS"])
    def test_what_has_no_weight_never_counts_and_boxes_without_area_are_finite(self, kind, name):
        options = {"kind": kind, "transform": TRANSFORMS[name]}
        student, teacher, weights = randn(2, 4, 5), randn(2, 4, 5, seed=1), rand(2, 1, 5)
        weights[:, :, 3:] = 0
        expected = dense_box_loss(student[..., :3], teacher[..., :3], weights[..., :3], **options)
        student[..., 3:], teacher[..., 3:] = float("nan"), 1e30
        student.requires_grad_()
        found = dense_box_loss(student, teacher, weights, **options)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found, student)
        assert gradient.isfinite().all() and not gradient[..., 3:].any()
        for value in (0.0, -1e4, 1e4):
            flat = torch.full((1, 4, 2), value, requires_grad=True)
            found = dense_box_loss(flat, torch.zeros(1, 4, 2), torch.ones(1, 1, 2), **options)
            assert found.isfinite() and torch.autograd.grad(found, flat)[0].isfinite().all()

    def test_empty_and_wrong_inputs(self):
        empty = torch.zeros(0, 4, 5, requires_grad=True)
        loss = dense_box_loss(empty, torch.zeros(0, 4, 5), torch.zeros(0, 1, 5))
        loss.backward()
        assert loss == 0 and empty.grad.shape == (0, 4, 5)
        with pytest.raises(ValueError, match=r"found shapes \(2, 4, 5\), \(2, 4, 6\) and \(2, 1, 5\)"):
            dense_box_loss(randn(2, 4, 5), randn(2, 4, 6), rand(2, 1, 5))
        with pytest.raises(ValueError, match="Unknown kind of dense_box_loss 'gious'. Did you mean 'giou'"):
            dense_box_loss(randn(2, 4, 5), randn(2, 4, 5), rand(2, 1, 5), kind="gious")


def detector(kind: str, *, seed: int, **opts):
    """With opinions, and statistics that do not depend on the mode."""
    torch.manual_seed(seed)
    opts = {"MODEL__RESNETS__NORM": "FrozenBN", **opts}
    if kind == "RPN":
        model = build_model(tiny_cfg(**opts))
        head = model.proposal_generator.rpn_head
        predictors = [head.objectness_logits, head.anchor_deltas]
    else:
        model = tiny_fcos(**opts) if kind == "FCOS" else build_model(tiny_retinanet_cfg(**opts))
        predictors = [model.head.cls_score, model.head.bbox_pred]
    with torch.no_grad():
        for predictor in predictors:
            predictor.weight.mul_(100)
        predictors[0].bias.fill_(-2)
        if kind == "FCOS":  # boxes with an area
            predictors[1].bias.fill_(2)
    return model


def distil(loss, student, teacher, inputs=None):
    """The loss' value in a training step, and what it was given."""
    model = Distiller(student=student, teacher=teacher, losses=[loss], input_format="BGR").train()
    seen = []
    loss.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    model(inputs or batch())
    (((own, theirs, context), value),) = seen
    return value, own, theirs, context


LOSSES = {"RetinaNet": DenseSoftTargetLoss, "FCOS": DenseSoftTargetLoss, "RPN": RPNSoftTargetLoss}


def naive(kind, owner, maps, context, *, temperature, power, box_weight, box_loss, num_classes):
    """Anchor by anchor, in float64, with the boxes at their places; the predictions as Detectron2 orders them."""
    owner = getattr(owner, "proposal_generator", owner)
    count = len(maps[0]) // (3 if kind == "FCOS" else 2)
    total = weight = 0.0
    for level in range(count):
        own, theirs = ([side[i] for i in range(level, len(side), count)] for side in maps)
        anchors = owner.anchor_generator([own[0]] * count)[level].tensor.double()
        n, _, h, w = own[0].shape
        valid = context.valid(own[0])
        valid = torch.ones(n, h, w, dtype=torch.bool) if valid is None else valid[:, 0]
        per_position = len(anchors) // (h * w)
        valid = valid[..., None].expand(-1, -1, -1, per_position).reshape(n, -1)
        widths = (num_classes, 4, 1)
        own, theirs = (
            [permute_to_N_HWA_K(x.detach().double(), k) for x, k in zip(side, widths)] for side in (own, theirs)
        )
        for image in range(n):
            for i in valid[image].nonzero().flatten().tolist():
                s, t = ([x[image, i] for x in side] for side in (own, theirs))
                score = t[0].max().sigmoid()
                if kind == "FCOS":
                    score = (score * t[2][0].sigmoid()).sqrt()
                loss = kl(s[0] / temperature, t[0] / temperature) * temperature**2
                if box_loss == "l1":
                    loss = loss + box_weight * (s[1] - t[1]).abs().sum()
                else:
                    boxes = [owner.box2box_transform.apply_deltas(x[1][None], anchors[i][None]) for x in (s, t)]
                    loss = loss + box_weight * giou_loss(*boxes)[0]
                if kind == "FCOS":
                    loss = loss + kl(s[2], t[2])
                total, weight = total + score**power * loss, weight + score**power
    return total / weight


def kl(s, t):
    q, p = s.sigmoid(), t.sigmoid()
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()


@pytest.mark.parametrize("box_loss", ["giou", "l1"])
@pytest.mark.parametrize("kind", LOSSES)
def test_is_its_definition_over_the_anchors_that_hold_image(kind, box_loss):
    student, teacher = detector(kind, seed=0), detector(kind, seed=1, depth=50, width=8)
    options = {"temperature": 2.0, "box_weight": 0.7, "box_loss": box_loss}
    loss = LOSSES[kind](**options, confidence_power=1.5)
    value, own, theirs, context = distil(loss, student, teacher, batch(((32, 64), (32, 40))))
    num_classes = 1 if kind == "RPN" else 3
    expected = naive(kind, student, (own, theirs), context, **options, power=1.5, num_classes=num_classes)
    assert value.item() == pytest.approx(expected.item(), rel=1e-3) and value > 0.01


def test_without_weights_its_classes_are_those_of_soft_targets():
    student, teacher = detector("RetinaNet", seed=0), detector("RetinaNet", seed=1)
    soft_targets = SoftTargetLoss(student_taps=["head.cls_score"], temperature=2.0)
    expected, *_ = distil(soft_targets, student, teacher)
    dense = DenseSoftTargetLoss(temperature=2.0, confidence_power=0.0, box_weight=0.0)
    found, *_ = distil(dense, student, teacher)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_equal_networks_agree_and_others_are_taught(kind):
    student = detector(kind, seed=0)
    value, *_ = distil(LOSSES[kind](), student, copy.deepcopy(student))
    assert value.abs() < 1e-5
    teacher = detector(kind, seed=1, depth=50, width=8)
    value, *_ = distil(LOSSES[kind](), student, teacher)
    value.backward()
    for part in (student.backbone, getattr(student, "head", None) or student.proposal_generator):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize("kind", LOSSES)
def test_centerness_and_boxes_are_part_of_it(kind):
    student, teacher = detector(kind, seed=0), detector(kind, seed=1)
    value, *_ = distil(LOSSES[kind](box_weight=0.0), student, teacher)
    value.backward()
    head = student.proposal_generator.rpn_head if kind == "RPN" else student.head
    boxes = head.anchor_deltas if kind == "RPN" else head.bbox_pred
    assert boxes.weight.grad is None or not boxes.weight.grad.any()
    assert kind != "FCOS" or head.ctrness.weight.grad.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_size_of_the_images_and_the_objects_do_not_matter(kind):
    """Twice the same image is once the image, and ground truth is not read."""
    student, teacher = detector(kind, seed=0), detector(kind, seed=1)
    (image,) = batch(((64, 96),))
    once, *_ = distil(LOSSES[kind](), student, teacher, [image])
    twice, *_ = distil(LOSSES[kind](), student, teacher, [image, image])
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-6)
    if kind != "FCOS":  # which fails on such images in v0.6
        empty = {**image, "instances": image["instances"][:0]}
        without, *_ = distil(LOSSES[kind](), student, teacher, [empty])
        torch.testing.assert_close(once, without, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_under_autocast(kind):
    loss = LOSSES[kind]()
    exact, own, theirs, context = distil(loss, detector(kind, seed=0), detector(kind, seed=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = loss([x.bfloat16() for x in own], theirs, context)
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.05)


def test_from_a_config_beside_other_losses(tmp_path):
    cfg = distillation_cfg(tmp_path, "RPNSoftTarget", "SoftTarget", "NST", KD__RPN_SOFT_TARGET__WEIGHT=2.0)
    model = build_model(cfg).train()
    assert model.losses["rpn_soft_target"].box_loss == "l1"
    losses = model(batch())
    assert losses["loss_rpn_soft_target"] > 0 and losses["loss_nst"] > 0


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_classes_that_both_know_are_compared(kind):
    more = {"num_classes": 4} if kind == "FCOS" else {"MODEL__RETINANET__NUM_CLASSES": 4}
    student, teacher = detector(kind, seed=0), detector(kind, seed=1, **more)
    loss = DenseSoftTargetLoss(box_weight=0.0, class_map=[[0, 3], [2, 1]])
    value, own, theirs, _ = distil(loss, student, teacher, batch(((64, 64), (64, 64))))
    (s, *_), (t, *others) = (loss.by_anchor(maps, len(loss.student_taps)) for maps in (own, theirs))
    s, t = s[:, [0, 2]], t[:, [3, 1]]
    centerness = others[1] if kind == "FCOS" else None
    weights = confidence_weights(t, centerness=centerness)
    expected = dense_class_loss(s, t, weights)
    if kind == "FCOS":
        expected = expected + dense_class_loss(loss.by_anchor(own, 3)[2], centerness, weights)
    torch.testing.assert_close(value, expected)
    assert value > 0
    with pytest.raises(ValueError, match="the student has 3 classes and the teacher 4"):
        distil(DenseSoftTargetLoss(), student, teacher)
    assert distil(CrossKDLoss(cut=1), student, teacher)[0] > 0  # the classes of the teacher's head on both sides


def test_an_rpn_of_other_classes_teaches(tmp_path):
    teacher = tiny_cfg(depth=50, width=8, MODEL__ROI_HEADS__NUM_CLASSES=7)
    assert build_model(distillation_cfg(tmp_path, "RPNSoftTarget", teacher=teacher)).train()(batch())


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda: DenseSoftTargetLoss(temperature=0), "temperature must be a positive number, found 0"),
        (lambda: DenseSoftTargetLoss(box_loss="ciou"), "Unknown kind of dense_box_loss 'ciou'.*giou"),
        (lambda: DenseSoftTargetLoss(box_weight=-1.0), "DenseSoftTargetLoss: box_weight must be a finite number >= 0"),
        (lambda: CrossKDLoss(confidence_power=float("nan")), "CrossKDLoss: confidence_power must be a finite number"),
        (lambda: RPNSoftTargetLoss(student_taps=["p2"]), "RPNSoftTargetLoss chooses the taps in the heads itself"),
        (lambda: CrossKDLoss(cut=0), "the cut must be at least 1 convolution, found 0"),
    ],
)
def test_options_that_cannot_be(loss, message):
    with pytest.raises(ValueError, match=message):
        loss()


@pytest.mark.parametrize(
    "student, teacher, loss, message",
    [
        ("RetinaNet", "FCOS", DenseSoftTargetLoss, "the teacher's a FCOSHead that predicts cls_score, bbox_pred, ctr"),
        ("RPN", "RetinaNet", DenseSoftTargetLoss, "the student GeneralizedRCNN has no dense head"),
        ("RPN", "RetinaNet", RPNSoftTargetLoss, "the teacher RetinaNet has no RPN"),
        ("FCOS", "RetinaNet", CrossKDLoss, "CrossKDLoss compares two heads at the same anchors: the stud"),
    ],
)
def test_networks_that_cannot_be_compared(student, teacher, loss, message):
    with pytest.raises(ValueError, match=message) as e:
        distil(loss(), detector(student, seed=0), detector(teacher, seed=1))
    assert "\n" not in str(e.value)
