import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

from kd_det import Distiller
from kd_det.classification.gradient_attention import GradientAttentionLoss, pixel_gradients
from tests import tiny
from tests.classification.tiny_classifier import classifier_cfg, distilled_cfg, images


def per_image_gradients(model, inputs):
    """d CE_n / d image_n, summed CE, by a forward written out."""
    x = torch.stack([i["image"] for i in inputs]).float().requires_grad_()
    features = model.backbone((x - model.pixel_mean) / model.pixel_std)["res5"]
    losses = F.cross_entropy(
        model.linear(features.mean((2, 3))), torch.tensor([i["label"] for i in inputs]), reduction="none"
    )
    return torch.autograd.grad(losses.sum(), x)[0]


def test_value_is_that_of_the_definition(tmp_path):
    model = build_model(distilled_cfg(tmp_path, "GradientAttentionLoss", KD__GRADIENT_AT__WEIGHT=3.0)).train()
    found = model(images())["loss_gradient_at"].item()
    js, jt = per_image_gradients(model.student, images()), per_image_gradients(model.teacher, images())
    expected = 3 * (js - jt).double().square().sum((1, 2, 3)).mean().item()
    assert found == pytest.approx(expected, rel=1e-3) and expected > 0


def test_gradient_through_the_network_twice():
    model = build_model(classifier_cfg(width=2)).double().train()
    inputs = [{**x, "image": x["image"].double().requires_grad_()} for x in images(2)]
    target = [0.01 * torch.randn_like(x["image"]) for x in inputs]

    def loss(stem, linear):
        parameters = {"backbone.stem.conv1.weight": stem, "linear.weight": linear}
        loss = torch.func.functional_call(Losses(model), {f"model.{k}": v for k, v in parameters.items()}, (inputs,))
        found = pixel_gradients({"loss_cls": loss}, inputs, create_graph=True)
        return sum((j - t).square().sum() for j, t in zip(found, target))

    stem = model.backbone.stem.conv1.weight.detach()[:, :, 2:4, 2:4].clone()

    def of_a_patch(patch, linear):
        return loss(F.pad(patch, (2, 3, 2, 3)), linear)

    linear = 20 * model.linear.weight.detach()
    assert torch.autograd.gradcheck(of_a_patch, (stem.requires_grad_(), linear.requires_grad_()), rtol=1e-3)


class Losses(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model.task_losses(inputs)["loss_cls"]


def test_a_student_that_is_the_teacher_has_no_loss_in_any_channel_order():
    cfg = classifier_cfg(MODEL__PIXEL_MEAN=[1.0, 2.0, 3.0])
    student = build_model(cfg).eval()
    teacher = build_model(cfg)
    teacher.load_state_dict(student.state_dict())
    teacher.input_format = "BGR"
    with torch.no_grad():
        teacher.backbone.stem.conv1.weight.copy_(student.backbone.stem.conv1.weight.flip(1))
    teacher.pixel_mean = student.pixel_mean.flip(0)
    loss = GradientAttentionLoss()
    model = Distiller(student=student, teacher=teacher, losses=[loss], input_format="RGB")
    model.train(), student.backbone.eval()  # batch norm as the teacher's
    value = model(images())["loss_gradient_at"]
    scale = per_image_gradients(student, images()).square().sum((1, 2, 3)).mean()
    assert scale > 0 and value < 1e-6 * scale


def test_only_the_student_gets_gradients_and_the_teacher_stays(tmp_path):
    model = build_model(distilled_cfg(tmp_path, "GradientAttentionLoss")).train()
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    model(images())["loss_gradient_at"].backward()
    without = [name for name, p in model.student.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["linear.bias"] or without == []
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.teacher.state_dict().items())


def test_float16_autocast_loses_no_gradient_at_the_pixels(tmp_path):
    """D29: they lie below float16's range, and no scaler is there for them."""
    model = build_model(distilled_cfg(tmp_path, "GradientAttentionLoss")).train()
    losses, gradients = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            loss = model(images())["loss_gradient_at"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.student.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0] > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())


def test_a_detector_is_refused():
    student, teacher = build_model(tiny.tiny_cfg()), build_model(tiny.tiny_cfg())
    with pytest.raises(ValueError, match="works for ImageClassifier, and the student is GeneralizedRCNN .ROIAlign"):
        Distiller(student=student, teacher=teacher, losses=[GradientAttentionLoss()], input_format="BGR")
