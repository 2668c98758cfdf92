"""Soft targets for classes that are independent of each other, as in the heads of RetinaNet and FCOS."""

from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from kd_det.losses._spatial import full_precision, to_float, zero_loss

__all__ = ["binary_soft_target_loss"]


@full_precision
def binary_soft_target_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0, valid: Optional[Tensor] = None
) -> Tensor:
    """
    ``T^2 KL(Bernoulli(sigmoid(t / T)) || Bernoulli(sigmoid(s / T)))``, summed over classes and averaged over anchors.
    The cousin of :func:`soft_target_loss` for heads that decide each class by a sigmoid of its own: a softmax over such
    logits would compare what the head never compares.

    Args:
        student_logits: (N, K), or dense (N, K, ...): K classes on axis 1. With A anchors at a position, axis 1 holds
            their A K classes, and A times the average over anchors is returned.
        teacher_logits: of the same shape; is detached.
        temperature: T > 0.
        valid: bool (N, 1, ...), the anchors that hold image; None: all.

    Returns:
        A scalar; 0 for an empty batch, or without a valid anchor.

    Raises:
        ValueError: shapes that differ, a mask that does not fit, or a temperature that is not positive.
    """
    name = "binary_soft_target_loss"
    student, teacher = to_float(name, student_logits, teacher_logits)
    if student.dim() < 2 or student.shape != teacher.shape:
        raise ValueError(
            f"{name}: both logits must be (N, K, ...) over the same classes, found shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    if valid is not None and valid.shape != (student.shape[0], 1, *student.shape[2:]):
        raise ValueError(
            f"{name}: valid must be {(student.shape[0], 1, *student.shape[2:])}, found {tuple(valid.shape)}."
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{name}: the temperature must be a positive number, found {temperature}.")
    if student.numel() == 0:
        return zero_loss(student)
    if valid is not None:
        student, teacher = student.masked_fill(~valid, 0), teacher.masked_fill(~valid, 0)
    student, teacher = student / temperature, teacher / temperature
    # By the logarithms of both probabilities, as 1 - p loses all digits of a confident prediction.
    divergence = sum(
        F.kl_div(F.logsigmoid(sign * student), F.logsigmoid(sign * teacher), log_target=True, reduction="sum")
        for sign in (1, -1)
    )
    anchors = student[:, 0].numel() if valid is None else valid.sum().clamp(min=1)
    return temperature * temperature * divergence / anchors
