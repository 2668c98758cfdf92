"""DIST, knowledge distillation from a stronger teacher: arXiv 2205.10536."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from kd_det.losses._ranks import gather_samples
from kd_det.losses._spatial import full_precision, to_float, unit_rows, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.logits import LogitLoss

__all__ = ["DISTLoss", "dist_loss"]


@full_precision
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """
    ``T^2 (beta inter + gamma intra)`` (equations 6 to 9): inter is 1 - Pearson's correlation of both softmaxes over
    classes, averaged over samples; intra the same over samples, averaged over classes.

    The published code adds 1e-8 to the denominator of the correlation, which biases it where probabilities are small,
    as they are among many classes; here only a constant row, which has no correlation, is treated apart: it counts 1.

    Args:
        student_logits: (N, K).
        teacher_logits: (N, K); is detached.
        beta, gamma: weights of the two parts.
        temperature: T > 0.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    student, teacher = to_float("dist_loss", student_logits, teacher_logits)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"dist_loss: both logits must be (N, K), found shapes {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"dist_loss: the temperature must be a positive number, found {temperature}.")
    if student.numel() == 0:
        return zero_loss(student)
    s, t = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature * temperature * (beta * _one_minus_pearson(s, t) + gamma * _one_minus_pearson(s.T, t.T))


def _one_minus_pearson(x: Tensor, y: Tensor) -> Tensor:
    """1 - correlation of (B, D) with (B, D), row by row, averaged over rows."""
    x, y = (_centred_unit(rows) for rows in (x, y))
    return 1 - (x * y).sum(1).mean()


def _centred_unit(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    # What is below the rounding of the mean is noise, whose direction must not count.
    noise = 4 * torch.finfo(rows.dtype).eps * rows.detach().abs().amax(1, keepdim=True)
    varies = centred.detach().abs().amax(1, keepdim=True) > noise
    return unit_rows(centred * varies)


@DISTILLATION_LOSS_REGISTRY.register()
class DISTLoss(LogitLoss):
    """:func:`dist_loss` on class logits (N, K), averaged over the stages of the box head or the taps."""

    name = "dist"

    @configurable
    def __init__(self, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, **kwargs):
        """
        Args:
            beta, gamma, temperature: see :func:`dist_loss`.
            kwargs: see :class:`DistillationLoss`.
        """
        super().__init__(**kwargs)
        self.options = {"beta": beta, "gamma": gamma, "temperature": temperature}
        no_samples = torch.empty(0, 2)
        dist_loss(no_samples, no_samples, **self.options)  # checks the options

    @classmethod
    def from_config(cls, cfg, student, teacher):
        node = cfg.KD.DIST
        options = {"beta": node.BETA, "gamma": node.GAMMA, "temperature": node.TEMPERATURE}
        return {**super().from_config(cfg, student, teacher), **options}

    def forward(self, student, teacher, context):
        # "Over samples" means those of all ranks.
        pairs = [gather_samples(s, t) for s, t, _ in self.logit_pairs(student, teacher, context)]
        return sum(dist_loss(s, t, **self.options) for s, t in pairs) / len(pairs)
