"""Soft targets of heads that decide each class by a sigmoid: RetinaNet and FCOS (D22, D23)."""

import pytest
import torch
from detectron2.modeling import build_model

from kd_det.losses import binary_soft_target_loss, soft_target_loss
from tests.tiny import batch, distillation_cfg, tiny_retinanet_cfg

TAP = ("head.cls_score",)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(student, teacher, temperature):
    """Anchor by anchor, class by class."""
    total = 0.0
    for s, t in zip(student.flatten(), teacher.flatten()):
        q, p = (1 / (1 + torch.exp(-x / temperature)) for x in (s, t))
        total += p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
def test_value_and_gradient_are_the_definition(temperature):
    student, teacher = randn(6, 5).requires_grad_(), randn(6, 5, seed=1)
    expected, found = (f(student, teacher, temperature=temperature) for f in (naive, binary_soft_target_loss))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])
    assert torch.autograd.gradcheck(lambda s: binary_soft_target_loss(s, teacher, temperature=temperature), student)


def test_by_hand():
    # A probability of 3/4 against 1/2: 3/4 ln 3/2 + 1/4 ln 1/2.
    teacher = torch.tensor([[3.0]]).log()
    kl = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(binary_soft_target_loss(torch.zeros(1, 1), teacher, temperature=1), kl)
    torch.testing.assert_close(binary_soft_target_loss(torch.zeros(1, 1), 2 * teacher, temperature=2), 4 * kl)


def test_it_is_the_sum_of_two_class_softmaxes():
    student, teacher = randn(6, 5), randn(6, 5, seed=1)
    pairs = [[torch.stack([x[:, k], torch.zeros(6)], dim=1) for x in (student, teacher)] for k in range(5)]
    torch.testing.assert_close(binary_soft_target_loss(student, teacher), sum(soft_target_loss(*p) for p in pairs))
    assert binary_soft_target_loss(student, student) == 0


@pytest.mark.parametrize("loss_fn", [soft_target_loss, binary_soft_target_loss])
def test_padding_never_counts(loss_fn):
    student, teacher = randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1)
    valid = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    valid[0], valid[1, :, :2, :3] = True, True
    alone = [x.permute(0, 2, 3, 1)[valid[:, 0]] for x in (student, teacher)]
    padded = student.masked_fill(~valid, float("nan")).requires_grad_()
    loss = loss_fn(padded, teacher.masked_fill(~valid, 1e6), valid=valid)
    torch.testing.assert_close(loss, loss_fn(*alone))
    (gradient,) = torch.autograd.grad(loss, padded)
    assert not gradient.masked_fill(valid, 0).any()
    assert loss_fn(student, teacher, valid=torch.zeros_like(valid)) == 0


def test_extreme_empty_and_wrong_inputs():
    for scale in (1e4, 1e-20, 0):
        student = (randn(3, 5) * scale).float().requires_grad_()
        loss = binary_soft_target_loss(student, (randn(3, 5, seed=1) * scale).float())
        loss.backward()
        assert loss.isfinite() and loss >= 0 and student.grad.isfinite().all()
    empty = torch.zeros(0, 5, requires_grad=True)
    loss = binary_soft_target_loss(empty, torch.zeros(0, 5))
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 5)
    with pytest.raises(ValueError, match=r"same classes, found shapes \(3, 5\) and \(3, 6\)"):
        binary_soft_target_loss(torch.zeros(3, 5), torch.zeros(3, 6))
    with pytest.raises(ValueError, match="positive number, found 0"):
        binary_soft_target_loss(torch.zeros(3, 5), torch.zeros(3, 5), temperature=0)
    with pytest.raises(ValueError, match=r"valid must be \(3, 1\), found \(3,\)"):
        binary_soft_target_loss(torch.zeros(3, 5), torch.zeros(3, 5), valid=torch.ones(3, dtype=torch.bool))


def retinanet(tmp_path, *losses, **opts):
    taps = {f"KD__{name}__STUDENT_TAPS": TAP for name in ("SOFT_TARGET", "DIST")}
    cfg = distillation_cfg(
        tmp_path,
        *losses,
        teacher=tiny_retinanet_cfg(),
        KD__STUDENT__META_ARCHITECTURE="RetinaNet",
        **taps,
        **opts,
    )
    plain = tiny_retinanet_cfg()
    plain.MODEL.META_ARCHITECTURE, plain.KD = "Distiller", cfg.KD
    return plain


def test_all_levels_of_a_retinanet_are_compared_over_their_valid_anchors(tmp_path):
    model = build_model(retinanet(tmp_path, "SoftTarget")).train()
    seen = []
    model.losses["soft_target"].register_forward_hook(lambda m, args, out: seen.append((args, out)))
    model(batch())
    (((student, teacher, context), value),) = seen
    assert len(student) == len(teacher) > 1
    anchors = student[0].shape[1] // 3
    total = count = 0
    for s, t in zip(student, teacher):
        assert s.shape == t.shape
        valid = context.valid(s)
        valid = torch.ones_like(s[:, 0], dtype=torch.bool) if valid is None else valid[:, 0]
        s, t = (x.permute(0, 2, 3, 1)[valid].view(-1, 3) for x in (s, t))  # (positions A, K)
        total += binary_soft_target_loss(s, t, temperature=2.0) * len(s)
        count += valid.sum() * anchors
    torch.testing.assert_close(value, total / count)


def test_losses_over_softmaxes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="DISTLoss compares softmaxes, and the dense head of RetinaNet decides 3"):
        build_model(retinanet(tmp_path, "DIST"))


def test_other_anchors_are_refused(tmp_path):
    teacher = tiny_retinanet_cfg(MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[[1.0]])
    cfg = retinanet(tmp_path, "SoftTarget")
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    torch.save({"model": build_model(teacher).state_dict()}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match="has 9 channels of logits for 3 classes and the teacher 3 .*many anchors"):
        build_model(cfg)


def test_a_tap_in_the_head_goes_with_a_loss_on_regions(tmp_path):
    # D24
    taps = {"KD__NST__STUDENT_TAPS": ("proposal_generator.rpn_head.conv",)}
    model = build_model(distillation_cfg(tmp_path, "NST", "SoftTarget", **taps)).train()
    losses = model(batch())
    assert losses["loss_nst"] > 0 and losses["loss_soft_target"] > 0
