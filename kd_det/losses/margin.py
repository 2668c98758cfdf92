"""
The margin of OFD's margin ReLU, m_c = E[x_c | x_c < 0]: arXiv 1904.01866, section 3.1; measured, or in closed form.
"""

import math

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from torch import Tensor, nn

from kd_det.features.taps import tap_module

__all__ = ["Margin", "margin_from_norm", "margin_relu", "norm_behind"]


def margin_from_norm(weight: Tensor, bias: Tensor) -> Tensor:
    """
    The margin E[x | x < 0] of a channel x ~ N(bias, weight^2), as behind a norm layer (section 3.1):
    ``b - |w| phi(z) / Phi(-z)`` with ``z = b / |w|``; ``min(b, 0)`` where w = 0.

    The published code divides by zero at w = 0, and takes ``-3 |w|`` wherever Phi(-z) < 0.001, although the expectation
    is about ``-|w| / z`` there. The expectation is followed.

    Args:
        weight: (C,), the scale of the norm layer. Its sign does not matter.
        bias: (C,), its shift.

    Returns:
        (C,), of the type and on the device of ``weight``, without a graph.

    Raises:
        ValueError: shapes that differ.
    """
    if weight.shape != bias.shape:
        raise ValueError(
            f"margin_from_norm: weight and bias must have one shape, found {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}."
        )
    # In float64 on the CPU: some devices lack the type, and C numbers cost nothing.
    w, b = (x.detach().to("cpu", torch.float64) for x in (weight.abs(), bias))
    z = b / w.masked_fill(w == 0, 1)
    near = z.clamp(max=10)
    log_density = -0.5 * near.square() - 0.5 * math.log(2 * math.pi)
    closed = b - w * torch.exp(log_density - torch.special.log_ndtr(-near))
    # Far above zero the closed form is the difference of two close numbers: Laplace's continued fraction of
    # phi(z) / Phi(-z) - z instead, 1 / (z + 2 / (z + 3 / (z + ...))). 30 terms are exact to 1e-12 from z = 10 on.
    far = z.clamp(min=10)
    tail = far
    for k in range(30, 1, -1):
        tail = far + k / tail
    margin = torch.where(z > 10, -w / tail, closed)
    return torch.where(w == 0, b.clamp(max=0), margin).to(weight)


def margin_relu(teacher: Tensor, margin: Tensor) -> Tensor:
    """
    ``max(x, m_c)`` per channel (equation 2).

    Args:
        teacher: (N, C, ...), pre-activation; is detached.
        margin: (C,), the margins m_c, at most 0.

    Returns:
        A tensor of the teacher's shape, in float32 (float64 if the teacher is).

    Raises:
        ValueError: another number of margins than channels.
    """
    if teacher.dim() < 2 or margin.shape != (teacher.shape[1],):
        raise ValueError(
            f"margin_relu: needs one margin for each channel, found margins of shape {tuple(margin.shape)} for "
            f"features of shape {tuple(teacher.shape)}."
        )
    teacher = teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32))
    return torch.maximum(teacher, margin.detach().to(teacher).view(-1, *[1] * (teacher.dim() - 2)))


class Margin(nn.Module):
    """
    The margin m_c = E[x_c | x_c < 0] of the teacher's responses, per channel, and how many responses it was taken
    from. Both are buffers: they are saved, restored and moved with the loss.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("value", torch.zeros(channels))
        self.register_buffer("count", torch.zeros(channels, dtype=torch.int64))

    @torch.no_grad()
    def observe(self, teacher: Tensor, valid: Tensor | None) -> None:
        """
        Take in the responses of every rank's batch.

        Args:
            teacher: (N, C, H, W) pre-activation responses.
            valid: bool (N, 1, H, W), the positions that count; None: all.
        """
        negative = teacher < 0
        if valid is not None:
            negative &= valid
        count = negative.sum(dim=(0, 2, 3))
        total = torch.where(negative, teacher, 0).sum(dim=(0, 2, 3), dtype=torch.float64)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(count)
            torch.distributed.all_reduce(total)
        seen = self.count + count
        self.value += ((total - count * self.value.double()) / seen.clamp(min=1)).to(self.value.dtype)
        self.count = seen


def norm_behind(teacher: nn.Module, tap: str) -> tuple[Tensor, Tensor]:
    """
    Weight and bias of the last norm before a pre-activation tap, which make x ~ N(bias, weight^2) there.

    Raises:
        ValueError: no such norm, or a FrozenBatchNorm2d whose statistics were folded into its weight and bias (all
            Caffe2 and zoo weights): then they tell nothing about the distribution.
    """
    block = tap_module(teacher, tap, side="teacher")
    last = getattr(block, "conv3", None) or getattr(block, "conv2", None)
    norm = getattr(last, "norm", None)
    if not isinstance(norm, (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)) or norm.weight is None:
        raise ValueError(
            f"KD.OVERHAUL.MARGIN 'norm' needs a batch norm before {tap!r}, found {type(norm).__name__}; "
            f"use 'calibrated'."
        )
    folded = (norm.running_mean == 0).all() and torch.allclose(norm.running_var + norm.eps, torch.ones(()), atol=2e-5)
    if isinstance(norm, FrozenBatchNorm2d) and folded:
        raise ValueError(
            f"KD.OVERHAUL.MARGIN 'norm' is wrong at {tap!r}: its frozen norm's statistics are folded into weight and "
            f"bias (running mean 0, variance 1), which then do not describe the responses; use 'calibrated'."
        )
    return norm.weight.detach(), norm.bias.detach()
