import copy

import pytest
import torch
from detectron2.modeling import build_model

from kd_det.engine.loss_sizes import format_sizes, measure_losses
from tests.tiny import batch, distillation_cfg, tiny_cfg


def gradient_norm(model, keys):
    """By plain backward of the sum of some losses."""
    torch.manual_seed(0)
    model.zero_grad()
    losses = model(batch())
    own = losses.keys() - {"loss_nst", "loss_hint"}
    total = sum(losses[key] for key in keys or own)
    total.backward()
    gradients = [p.grad.double().flatten() for p in model.student.parameters() if p.grad is not None]
    return total.item(), torch.cat(gradients).norm().item()


def test_values_gradients_and_proposals(tmp_path):
    model = build_model(distillation_cfg(tmp_path, "NST", "Hint", KD__NST__WEIGHT=2.0)).train()
    before = copy.deepcopy(model.state_dict())
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 0.0  # measuring must be repeatable here; running statistics do move
    torch.manual_seed(0)
    sizes = measure_losses(model, [batch()], share=0.25)
    assert [s.name for s in sizes] == ["task", "nst", "hint"]
    for size, keys in zip(sizes, ((), ("loss_nst",), ("loss_hint",))):
        value, gradient = gradient_norm(model, keys)
        assert size.value == pytest.approx(value, rel=1e-5)
        assert size.gradient == pytest.approx(gradient, rel=1e-4)
    assert sizes[1].proposed == pytest.approx(2.0 * 0.25 * sizes[0].gradient / sizes[1].gradient)
    assert all(torch.equal(before[name], p) for name, p in model.student.named_parameters())


def test_the_proposed_weight_has_the_proposed_gradient(tmp_path):
    cfg = distillation_cfg(tmp_path, "NST")
    model = build_model(cfg).train()
    torch.manual_seed(0)
    _, nst = measure_losses(model, [batch()], share=0.3)
    model.losses["nst"].weight = nst.proposed
    torch.manual_seed(0)
    task, nst = measure_losses(model, [batch()], share=0.3)
    assert nst.gradient == pytest.approx(0.3 * task.gradient, rel=1e-3)
    assert nst.proposed == pytest.approx(nst.weight, rel=1e-3)


def test_means_over_batches(tmp_path):
    model = build_model(distillation_cfg(tmp_path, "NST", MODEL__RESNETS__NORM="FrozenBN")).train()
    one, two = (measure_losses(model, [batch(seed=s)])[1] for s in (1, 2))
    both = measure_losses(model, [batch(seed=1), batch(seed=2)])[1]
    assert both.value == pytest.approx((one.value + two.value) / 2)
    assert both.gradient == pytest.approx((one.gradient + two.gradient) / 2, rel=1e-4)


def test_a_loss_without_gradient_gets_no_proposal(tmp_path):
    cfg = distillation_cfg(tmp_path, "NST", MODEL__BACKBONE__FREEZE_AT=5, KD__NST__STUDENT_TAPS=["res3"])
    _, nst = measure_losses(build_model(cfg).train(), [batch()])
    assert nst.value > 0 and nst.gradient == 0 and nst.proposed is None
    assert "nst" in format_sizes([_, nst])


@pytest.mark.parametrize("share, batches, message", [(0, [batch()], "share must be positive"), (1, [], "no batch")])
def test_bad_arguments(tmp_path, share, batches, message):
    model = build_model(distillation_cfg(tmp_path, "NST")).train()
    with pytest.raises(ValueError, match=message):
        measure_losses(model, batches, share=share)


def test_a_model_without_losses():
    with pytest.raises(ValueError, match="no distillation losses to measure"):
        measure_losses(build_model(tiny_cfg(MODEL__META_ARCHITECTURE="Distiller")), [batch()])


def test_what_only_a_loss_reaches_does_not_count(tmp_path):  # D32
    levels = {"MODEL__RPN__IN_FEATURES": ["p3", "p4", "p5", "p6"], "MODEL__ROI_HEADS__IN_FEATURES": ["p3", "p4", "p5"]}
    anchors = {"MODEL__ANCHOR_GENERATOR__SIZES": [[16], [32], [64], [128]]}
    cfg = distillation_cfg(tmp_path, "NST", KD__NST__STUDENT_TAPS=["p2"], **levels, **anchors)
    model = build_model(cfg).train()
    torch.manual_seed(0)
    _, nst = measure_losses(model, [batch()])
    model.zero_grad()
    model(batch())["loss_nst"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    own = [g for name, g in gradients.items() if not name.startswith(("backbone.fpn_output2", "backbone.fpn_lateral2"))]
    assert len(own) == len(gradients) - 4
    assert nst.gradient == pytest.approx(torch.stack([g.double().norm() for g in own]).norm().item(), rel=1e-3)
