"""DKD, decoupled knowledge distillation: arXiv 2203.08679."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from kd_det.losses._spatial import full_precision, to_float, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.logits import LogitLoss

__all__ = ["DKDLoss", "dkd_loss"]


@full_precision
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """
    ``T^2 (alpha TCKD + beta NCKD)``, averaged over samples (equation 7): TCKD is the divergence of (label, any other
    class), NCKD that among the other classes. With beta the teacher's probability of the other classes, and alpha 1,
    the sum would be that of soft targets (equation 6).

    Args:
        student_logits: (N, K).
        teacher_logits: (N, K); is detached.
        labels: (N,), integers in [0, K).
        alpha, beta: weights of the two parts.
        temperature: T > 0.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive, or a label out of range.
    """
    student, teacher = to_float("dkd_loss", student_logits, teacher_logits)
    if student.dim() != 2 or student.shape != teacher.shape or labels.shape != student.shape[:1]:
        raise ValueError(
            f"dkd_loss: logits must both be (N, K) and labels (N,), found shapes {tuple(student.shape)}, "
            f"{tuple(teacher.shape)} and {tuple(labels.shape)}."
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"dkd_loss: the temperature must be a positive number, found {temperature}.")
    if student.numel() == 0:
        return zero_loss(student)
    classes = student.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"dkd_loss: labels must be in [0, {classes}), found {labels.min().item()} to {labels.max().item()}."
        )
    is_label = F.one_hot(labels.long(), classes).bool()
    parts = [_decouple(logits / temperature, is_label) for logits in (student, teacher)]
    target, others = (
        F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(1).mean() for log_s, log_t in zip(*parts)
    )
    return temperature * temperature * (alpha * target + beta * others)


def _decouple(logits: Tensor, is_label: Tensor):
    """Log-probabilities (N, 2) of the label and of any other class, and (N, K - 1) of the others among themselves."""
    log_p = F.log_softmax(logits, dim=1)
    others = logits[~is_label].view(len(logits), -1)
    # By logsumexp, as 1 - p loses all digits of a confident prediction.
    log_rest = torch.logsumexp(log_p[~is_label].view(len(logits), -1), dim=1)
    # A single class leaves no other: probability 0, which costs nothing in both networks.
    log_rest = log_rest.clamp(min=-1e30)
    return torch.stack([log_p[is_label], log_rest], dim=1), F.log_softmax(others, dim=1)


@DISTILLATION_LOSS_REGISTRY.register()
class DKDLoss(LogitLoss):
    """
    :func:`dkd_loss` on the logits of the regions that the student samples, labelled by its own matcher (background
    is the last class), averaged over the stages of the box head. Reads no taps.
    """

    name = "dkd"

    @configurable
    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, **kwargs):
        """
        Args:
            alpha, beta, temperature: see :func:`dkd_loss`.
            kwargs: see :class:`DistillationLoss`, without taps.
        """
        super().__init__(**kwargs)
        if self.student_taps:
            raise ValueError(f"DKDLoss needs the labels of regions and reads no taps, found {self.student_taps}.")
        self.options = {"alpha": alpha, "beta": beta, "temperature": temperature}
        no_samples = torch.empty(0, 2)
        dkd_loss(no_samples, no_samples, torch.empty(0, dtype=torch.int64), **self.options)  # checks the options

    @classmethod
    def from_config(cls, cfg, student, teacher):
        node = cfg.KD.DKD
        options = {"alpha": node.ALPHA, "beta": node.BETA, "temperature": node.TEMPERATURE}
        return {**super().from_config(cfg, student, teacher), **options}

    def forward(self, student, teacher, context):
        pairs = self.logit_pairs(student, teacher, context)
        total = 0.0
        for stage, (s, t) in enumerate(pairs):
            total = total + dkd_loss(s, t, context.region_targets(stage).classes, **self.options)
        return total / len(pairs)
