"""Products of a matrix with itself, at the cost of their distinct entries."""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kd_det.losses._spatial import full_precision

__all__ = ["SelfProduct", "self_product"]

# Rows of a block: with fewer, the products are too thin for the CPU's vector units.
_ROWS = 64


def self_product(x: Tensor) -> Tensor:
    """
    ``x x^T`` of (N, C, P), which is (N, C, C), without a graph. On a CPU, blocks of rows leave out the half that
    mirrors the other; elsewhere, one call is faster than several.
    """
    if x.device.type != "cpu":
        return torch.bmm(x, x.mT)
    n, c, _ = x.shape
    out = x.new_empty(n, c, c)
    for start in range(0, c, _ROWS):
        stop = min(start + _ROWS, c)
        block = torch.bmm(x[:, start:stop], x[:, start:].mT)
        out[:, start:stop, start:] = block
        out[:, stop:, start:stop] = block[:, :, stop - start :].mT
    return out


class SelfProduct(Function):
    """:func:`self_product` with its gradient: one product where that of ``x @ x.mT`` takes two."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return self_product(x)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.bmm(grad + grad.mT, x)
