"""FSP, the flow of solution procedure: Yim et al., A gift from knowledge distillation, CVPR 2017."""

from typing import Optional

import torch
from detectron2.config import configurable
from torch import Tensor

from kd_det.losses._spatial import full_precision, pool_to, to_float, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.connected import ConnectedLoss

__all__ = ["FSPLoss", "fsp_loss", "fsp_matrix"]


@full_precision
def fsp_matrix(first: Tensor, second: Tensor, *, valid: Optional[Tensor] = None) -> Tensor:
    """
    Equation 1: ``G_ij = sum_{h,w} first_i second_j / (h w)``, how two layers' channels go together.

    Args:
        first: (N, Ci, H, W).
        second: (N, Cj, H', W'). The larger map is average-pooled to the smaller.
        valid: bool (N, 1, H, W) at the size of either: the positions that hold image, over which the mean is taken.

    Returns:
        (N, Ci, Cj), in float32 or float64.

    Raises:
        ValueError: maps of other shapes or types.
    """
    for x in (first, second):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"fsp_matrix: both maps must be floating-point (N, C, H, W), found {_describe(x)}.")
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"fsp_matrix: both maps must hold the same images, found batches of {first.shape[0]} and {second.shape[0]}."
        )
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    size = tuple(map(min, first.shape[2:], second.shape[2:]))
    first, second = (pool_to(x.to(dtype), size, valid).flatten(2) for x in (first, second))
    if valid is None:
        return first @ second.transpose(1, 2) / max(first.shape[2], 1)
    valid = pool_to(valid.to(dtype), size).flatten(2) > 0
    return (first * valid) @ second.transpose(1, 2) / valid.sum(2, keepdim=True).clamp(min=1)


@full_precision
def fsp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """
    Equation 2 for one pair of layers: ``|G_T - G_S|_F^2``, summed over entries, averaged over images. (Popular code
    takes the mean over entries as well, which divides it by Ci Cj.)

    Args:
        student: (N, Ci, Cj), see :func:`fsp_matrix`.
        teacher: of the same shape; is detached.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: shapes that differ.
    """
    student, teacher = to_float("fsp_loss", student, teacher)
    if student.dim() != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"fsp_loss: both matrices must have one shape (N, Ci, Cj), found {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; put connectors on the student."
        )
    if student.numel() == 0:
        return zero_loss(student)
    return (student - teacher).square().sum() / student.shape[0]


def _describe(x) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


@DISTILLATION_LOSS_REGISTRY.register()
class FSPLoss(ConnectedLoss):
    """
    :func:`fsp_loss` summed over flows. Taps are read two by two: ("res2", "res3", "res3", "res5") are the flows from
    res2 to res3 and from res3 to res5. Where the student has other channels than the teacher, a connector precedes
    the matrix; the paper takes networks of equal widths.
    """

    name = "fsp"

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: see :class:`ConnectedLoss`.

        Raises:
            ValueError: an odd number of taps, or none.
        """
        super().__init__(**kwargs)
        if not self.student_taps or len(self.student_taps) % 2:
            raise ValueError(
                f"FSPLoss: taps are read two by two, from one layer to another; found {len(self.student_taps)}: "
                f"{', '.join(self.student_taps) or 'none'}."
            )

    def forward(self, student, teacher, context):
        pairs = self.connected_pairs(student, teacher, context)
        total = 0.0
        for (s, t, valid), (s_next, t_next, _) in zip(pairs[::2], pairs[1::2]):
            total = total + fsp_loss(fsp_matrix(s, s_next, valid=valid), fsp_matrix(t, t_next, valid=context.valid(t)))
        return total
