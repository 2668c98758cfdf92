"""Products of a matrix with itself, at the price of their distinct entries."""

import torch
from torch import Tensor

__all__ = ["self_product"]

# Rows of a block: below it the products are too thin for the CPU's units.
_ROWS = 64


def self_product(x: Tensor) -> Tensor:
    """
    ``x x^T`` of (N, C, P), which is (N, C, C), without a graph. On a CPU, in blocks of rows that leave out the half
    that mirrors the other; elsewhere, one call is faster than several.
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
