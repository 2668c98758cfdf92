"""Losses whose gradient is known in closed form once their value is."""

from typing import Callable, Tuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["with_gradient"]


class _WithGradient(Function):
    @staticmethod
    def forward(ctx, student: Tensor, value_and_gradient: Callable[[Tensor], Tuple[Tensor, Tensor]]) -> Tensor:
        value, gradient = value_and_gradient(student)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None


def with_gradient(student: Tensor, value_and_gradient: Callable[[Tensor], Tuple[Tensor, Tensor]]) -> Tensor:
    """
    A loss without autograd inside: one map is kept for the backward, which is one multiplication.

    Args:
        student: the map that the loss is differentiated by.
        value_and_gradient: from the map to the loss, a scalar, and its gradient by the map.
    """
    return _WithGradient.apply(student, value_and_gradient)
