"""
Losses that are one elementwise pass over two maps, at the price of reading them once.

At p2 of an 800x1333 image a map of two images takes 137 MB. Plain autograd writes several temporaries of this size,
and on a CPU each of them is mapped and page-faulted anew, which costs many times the arithmetic. Work goes by blocks of
channels that stay in the cache, and the backward recomputes a block instead of having kept it.
"""

from typing import Callable, Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kd_det.losses._spatial import full_precision

__all__ = ["SquaredResidual", "blocks", "squared_error"]

# Elements of a block: about 2 MB of float32 on a CPU, so that it, its source and its scratch stay in the cache;
# elsewhere, enough to make the launch of a kernel not matter.
_BLOCK_ELEMENTS = {"cpu": 9 * 2**16}
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


def blocks(x: Tensor) -> Iterator[Tuple[slice, slice]]:
    """Index pairs (images, channels) that cut (N, C, H, W) into blocks; the first is the largest."""
    n, c, h, w = x.shape
    rows = max(1, _BLOCK_ELEMENTS.get(x.device.type, _BLOCK_ELEMENTS_ELSEWHERE) // max(1, h * w))
    images, channels = max(1, rows // c), min(rows, c)
    for i in range(0, n, images):
        for j in range(0, c, channels):
            yield slice(i, min(i + images, n)), slice(j, min(j + channels, c))


class SquaredResidual(Function):
    """
    ``sum_n weights[n] * |r(student[n], teacher[n])|^2`` where ``r`` is elementwise with derivative 1 in the student
    wherever it is not 0.

    Args:
        student, teacher: (N, C, H, W) of equal shape.
        weights: (N,).
        invalid: None or bool (N, 1, H, W), where the residual is 0.
        residual: called as ``residual(student_block, teacher_block, channels, out, scratch)``; writes the residual into
            ``out`` and may use ``scratch``, of the same shape.
    """

    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor,
        invalid: Optional[Tensor],
        residual: Callable[[Tensor, Tensor, slice, Tensor, Tensor], None],
    ) -> Tensor:
        cuts = list(blocks(student))
        out, scratch = (torch.empty_like(student[cuts[0]]) for _ in range(2))
        total = student.new_zeros(())
        for images, channels in cuts:
            n, c = images.stop - images.start, channels.stop - channels.start
            r, temporary = out[:n, :c], scratch[:n, :c]
            residual(student[images, channels], teacher[images, channels], channels, r, temporary)
            if invalid is not None:
                r.masked_fill_(invalid[images], 0)
            total += torch.mul(r, r, out=temporary).flatten(1).sum(1).dot(weights[images])
        ctx.residual = residual
        # A small map is one block: its residual is kept, which costs less than computing it again.
        ctx.save_for_backward(student, teacher, weights, invalid, out if len(cuts) == 1 else None)
        return total

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, grad: Tensor):
        student, teacher, weights, invalid, kept = ctx.saved_tensors
        factor = (2 * grad * weights)[:, None, None, None]
        if kept is not None:
            return kept * factor, None, None, None, None
        out = torch.empty_like(student)
        cuts = list(blocks(student))
        scratch = torch.empty_like(student[cuts[0]])
        for images, channels in cuts:
            r = out[images, channels]
            temporary = scratch[: r.shape[0], : r.shape[1]]
            ctx.residual(student[images, channels], teacher[images, channels], channels, r, temporary)
            if invalid is not None:
                r.masked_fill_(invalid[images], 0)
            r.mul_(factor[images])
        return out, None, None, None, None


def squared_error(student: Tensor, teacher: Tensor, weights: Tensor, invalid: Optional[Tensor]) -> Tensor:
    """:class:`SquaredResidual` of ``student - teacher``."""
    return SquaredResidual.apply(student, teacher, weights, invalid, _difference)


def _difference(student: Tensor, teacher: Tensor, channels: slice, out: Tensor, scratch: Tensor) -> None:
    torch.sub(student, teacher, out=out)
