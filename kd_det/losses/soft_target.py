"""Soft targets: arXiv 1503.02531."""

from typing import Optional

import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from kd_det.losses._ranks import share_of_samples
from kd_det.losses._spatial import full_precision, to_float, zero_loss
from kd_det.losses.binary_soft_target import binary_soft_target_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.logits import LogitLoss

__all__ = ["SoftTargetLoss", "soft_target_loss"]


@full_precision
def soft_target_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0, valid: Optional[Tensor] = None
) -> Tensor:
    """
    ``T^2 KL(softmax(t / T) || softmax(s / T))``, averaged over samples (and positions). The factor T^2 keeps the
    gradient's size when T changes (arXiv 1503.02531, section 2).

    Args:
        student_logits: (N, K), or dense (N, K, H, W): K classes on axis 1.
        teacher_logits: of the same shape; is detached.
        temperature: T > 0.
        valid: bool (N, 1, H, W), the positions of dense logits that hold image; None: all.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    student, teacher = to_float("soft_target_loss", student_logits, teacher_logits)
    if student.dim() < 2 or student.shape != teacher.shape:
        raise ValueError(
            f"soft_target_loss: both logits must be (N, K) or (N, K, H, W) over the same classes, found shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"soft_target_loss: the temperature must be a positive number, found {temperature}.")
    if student.numel() == 0:
        return zero_loss(student)
    if valid is not None:
        student, teacher = student.masked_fill(~valid, 0), teacher.masked_fill(~valid, 0)
    log_s = F.log_softmax(student / temperature, dim=1)
    log_t = F.log_softmax(teacher / temperature, dim=1)
    samples = student[:, 0].numel() if valid is None else valid.sum().clamp(min=1)
    return temperature * temperature * F.kl_div(log_s, log_t, log_target=True, reduction="sum") / samples


@DISTILLATION_LOSS_REGISTRY.register()
class SoftTargetLoss(LogitLoss):
    """
    :func:`soft_target_loss` on class logits, averaged over the stages of the box head or the maps; at the classifier of
    a dense head that decides by sigmoids, :func:`binary_soft_target_loss` over the anchors of all levels.
    """

    name = "soft_target"
    compares_sigmoids = True

    @configurable
    def __init__(self, *, temperature: float = 4.0, **kwargs):
        """
        Args:
            temperature: T of both softmaxes, positive.
            kwargs: see :class:`DistillationLoss`.
        """
        super().__init__(**kwargs)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"SoftTargetLoss: the temperature must be a positive number, found {temperature}.")
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return {**super().from_config(cfg, student, teacher), "temperature": cfg.KD.SOFT_TARGET.TEMPERATURE}

    def forward(self, student, teacher, context):
        pairs = self.logit_pairs(student, teacher, context)
        function = soft_target_loss if self.num_anchors is None else binary_soft_target_loss
        total = 0.0
        for s, t, valid in pairs:
            samples = s[:, 0].numel() if valid is None else valid.sum()
            mean = function(s, t, temperature=self.temperature, valid=valid)
            total = total + share_of_samples(samples, s.device) * mean
        # A position's channels are the classes of all its anchors.
        return total / len(pairs) / (self.num_anchors or 1)
