"""
Sums of squares over the channels of a map, for little more than reading it once.

At p2 of an 800x1333 image a map of two images takes 137 MB. Plain autograd writes several temporaries of this size,
and on a CPU each of them is mapped and page-faulted anew, which costs many times the arithmetic. So the work is done in
blocks of channels that stay in the cache, and the backward computes a block again instead of having kept it.
"""

from typing import Callable, Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kd_det.losses._spatial import Maps, full_precision

__all__ = ["SquaredResidual", "blocks", "squared_error", "squared_residuals"]

# About 2 MB of float32, so that a block, its source and its scratch stay in a CPU's cache.
_BLOCK_ELEMENTS = 9 * 2**16

# (student's block, teacher's block, the block's channels, out, scratch) -> the residual, whose derivative in the
# student is 1 wherever it is not 0. It may be written into ``out``, and ``scratch`` be used.
Residual = Callable[[Tensor, Optional[Tensor], slice, Tensor, Tensor], Tensor]


def blocks(x: Tensor) -> Iterator[Tuple[slice, slice]]:
    """
    Index pairs (images, channels) that cut (N, C, H, W) into blocks; the first is the largest. On an accelerator, where
    each block would be a launch of its own, there is one.
    """
    n, c, h, w = x.shape
    rows = max(1, _BLOCK_ELEMENTS // max(1, h * w)) if x.device.type == "cpu" else n * c
    images, channels = max(1, rows // c), min(rows, c)
    for i in range(0, n, images):
        for j in range(0, c, channels):
            yield slice(i, min(i + images, n)), slice(j, min(j + channels, c))


class SquaredResidual(Function):
    """
    ``sum_c r(student, teacher)_c^2`` at each position, (N, H, W).

    Args:
        student: (N, C, H, W).
        teacher: of the same shape, or None.
        residual: see :data:`Residual`.
        invalid: None or bool (N, 1, H, W), where the residual is 0.
    """

    @staticmethod
    def forward(
        ctx, student: Tensor, teacher: Optional[Tensor], residual: Residual, invalid: Optional[Tensor]
    ) -> Tensor:
        cuts = list(blocks(student))
        scratch = torch.empty_like(student[cuts[0]])
        # Without a teacher the residual is the student's block, and nothing is written into out.
        out = scratch if teacher is None else torch.empty_like(scratch)
        total = student.new_zeros((len(student), *student.shape[2:])) if len(cuts) > 1 else None
        for cut in cuts:
            r = _block(residual, student, teacher, invalid, cut, out, scratch)
            squares = torch.mul(r, r, out=scratch[: r.shape[0], : r.shape[1]]).sum(1)
            if len(cuts) > 1:
                total[cut[0]] += squares
        ctx.residual = residual
        # The residual of a single block is kept, which costs less than computing it again.
        ctx.save_for_backward(student, teacher, invalid, r if len(cuts) == 1 else None)
        return squares if len(cuts) == 1 else total

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, grad: Tensor):
        student, teacher, invalid, kept = ctx.saved_tensors
        factor = 2 * grad[:, None]
        if kept is not None:
            return kept * factor, None, None, None
        out = torch.empty_like(student)
        cuts = list(blocks(student))
        scratch = torch.empty_like(student[cuts[0]])
        for cut in cuts:
            r = _block(ctx.residual, student, teacher, invalid, cut, out[cut], scratch)
            torch.mul(r, factor[cut[0]], out=out[cut])
        return out, None, None, None


def _block(residual: Residual, student: Tensor, teacher, invalid, cut, out: Tensor, scratch: Tensor) -> Tensor:
    images, channels = cut
    student = student[cut]
    n, c = student.shape[:2]
    r = residual(student, None if teacher is None else teacher[cut], channels, out[:n, :c], scratch[:n, :c])
    return r if invalid is None else r.masked_fill_(invalid[images], 0)


def squared_error(maps: Maps, factors: Tensor) -> Tensor:
    """``sum_n factors[n] * |student[n] - teacher[n]|^2`` over the valid positions, each with its weight."""
    return squared_residuals(maps, _difference, factors)


def squared_residuals(maps: Maps, residual: Residual, factors: Tensor) -> Tensor:
    """:func:`squared_error` with another residual than the difference."""
    squares = SquaredResidual.apply(maps.student, maps.teacher, residual, maps.invalid)
    if maps.weights is not None:
        squares = squares * maps.weights[:, 0]
    return squares.flatten(1).sum(1).dot(factors)


def _difference(student: Tensor, teacher: Tensor, channels: slice, out: Tensor, scratch: Tensor) -> Tensor:
    return torch.sub(student, teacher, out=out)
