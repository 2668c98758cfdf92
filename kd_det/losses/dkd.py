"""DKD, decoupled knowledge distillation: arXiv 2203.08679."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from kd_det.losses._ranks import share_of_samples
from kd_det.losses._spatial import full_precision, to_float, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.logits import LogitLoss

__all__ = ["DKDLoss", "dkd_loss"]

# A logarithm of a probability that is 0, and a logit of a class that is left out: differences of two are 0, not NaN.
_LOW = -1e30


@full_precision
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    valid: Optional[Tensor] = None,
) -> Tensor:
    """
    ``T^2 (alpha TCKD + beta NCKD)``, averaged over samples (equation 7): TCKD is the divergence of (label, any other
    class), NCKD that among the other classes. With beta the teacher's probability of the other classes, and alpha 1,
    the sum would be that of soft targets (equation 6).

    Args:
        student_logits: (N, K).
        teacher_logits: (N, K); is detached.
        labels: (N,), integers in [0, K). As in torch's cross-entropy, another one is a RuntimeError on a CPU and an
            assertion of the device on a GPU.
        alpha, beta: weights of the two parts.
        temperature: T > 0.
        valid: bool (N,), the samples that count; None: all.

    Returns:
        A scalar; 0 for an empty batch, or if no sample counts.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
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
    label = labels.long()[:, None]
    is_label = torch.zeros_like(student, dtype=torch.bool).scatter_(1, label, True)
    parts = [_decouple(logits / temperature, label, is_label) for logits in (student, teacher)]
    divergences = (F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(1) for log_s, log_t in zip(*parts))
    if valid is None:
        target, others = (divergence.mean() for divergence in divergences)
    else:
        target, others = (torch.where(valid, d, 0).sum() / valid.sum().clamp(min=1) for d in divergences)
    return temperature * temperature * (alpha * target + beta * others)


def _decouple(logits: Tensor, label: Tensor, is_label: Tensor) -> Tuple[Tensor, Tensor]:
    """
    Log-probabilities (N, 2) of the label and of any other class, and (N, K) of the others among themselves, where the
    label's own is so low that it counts nothing.
    """
    log_p = F.log_softmax(logits, dim=1)
    # By logsumexp, as 1 - p loses all digits of a confident prediction. A low number instead of -inf, so that a single
    # class, which leaves no other, costs nothing and has a gradient of 0.
    log_rest = torch.logsumexp(log_p.masked_fill(is_label, _LOW), dim=1, keepdim=True)
    return torch.cat([log_p.gather(1, label), log_rest], dim=1), F.log_softmax(logits.masked_fill(is_label, _LOW), 1)


@DISTILLATION_LOSS_REGISTRY.register()
class DKDLoss(LogitLoss):
    """
    :func:`dkd_loss` on the logits of the regions that the student samples, labelled by its own matcher (background
    is the last class), averaged over the samples of all ranks and the stages of the box head. Regions of a class that
    the teacher does not know are left out: they have no label among the shared classes. Reads no taps.
    """

    name = "dkd"
    needs_labels = True

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
        for stage, (s, t, _) in enumerate(pairs):
            labels, valid, samples = context.region_targets(stage).classes, None, len(s)
            if self.classes is not None:
                labels, valid = self.classes.places(labels)
                samples = valid.sum()
            mean = dkd_loss(s, t, labels, valid=valid, **self.options)
            total = total + share_of_samples(samples, s.device) * mean
        return total / len(pairs)
