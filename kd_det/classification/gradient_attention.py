"""Gradient-based AT as a loss of a training step: arXiv 1612.03928, section 3.2."""

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.losses import DISTILLATION_LOSS_REGISTRY, DistillationLoss, gradient_attention_loss

__all__ = ["GradientAttentionLoss"]


@DISTILLATION_LOSS_REGISTRY.register()
class GradientAttentionLoss(DistillationLoss):
    """
    :func:`gradient_attention_loss` between the gradients of both networks' task losses at the pixels, for the same
    labels. Pixels, not normalised inputs, because each network normalises in its own way; a grey value is the unit of
    both, which makes the gradients of networks that were trained with a std near 58 that much smaller than the paper's
    (on normalised inputs) and this loss smaller by its square.

    Both networks must have ``task_losses``, as ``ImageClassifier`` has: ROIAlign has no second derivative, so a
    detector is refused.
    """

    name = "gradient_at"
    needs_labels = True
    needs_taps = False
    needs_one_teacher = True

    @configurable
    def __init__(self, **kwargs):
        """For arguments see :class:`DistillationLoss`."""
        super().__init__(**kwargs)

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        super().connect(student, teacher)
        for side, network in (("student", student), ("teacher", teacher)):
            if not hasattr(network, "task_losses"):
                raise ValueError(
                    f"{type(self).__name__} differentiates the task loss twice, down to the pixels, with the same "
                    f"labels for both networks: it works for ImageClassifier, and the {side} is "
                    f"{type(network).__name__} (ROIAlign has no second derivative). Distil attention in a detector by "
                    f"AttentionTransferLoss."
                )

    def prepare(self, batched_inputs: list[dict], device: torch.device) -> list[dict]:
        return with_pixel_gradients(batched_inputs, device)

    def forward(self, student, teacher, context):
        own = pixel_gradients(context.task_losses, context.batched_inputs, create_graph=True)
        inputs = with_pixel_gradients(context.batched_inputs, own[0].device)
        model = context.teacher.model
        theirs = pixel_gradients(model.task_losses(context.teacher.inputs(inputs)), inputs)
        return sum(gradient_attention_loss(s[None], t[None]) for s, t in zip(own, theirs)) / len(own)


def with_pixel_gradients(batched_inputs: list[dict], device: torch.device) -> list[dict]:
    """Batched inputs whose images are float leaves that keep their gradient."""
    return [
        {**x, "image": x["image"].detach().to(device, torch.float32, copy=True).requires_grad_()}
        for x in batched_inputs
    ]


def pixel_gradients(
    task_losses: dict[str, Tensor], batched_inputs: list[dict], *, create_graph: bool = False
) -> list[Tensor]:
    """
    The gradients of each image's own loss, if the task losses are means over the images. In full precision: no scaler
    keeps these gradients within float16's range.
    """
    images = [x["image"] for x in batched_inputs]
    with torch.autocast(images[0].device.type, enabled=False):
        total = len(images) * sum(task_losses.values())
        return list(torch.autograd.grad(total, images, create_graph=create_graph))
