"""
What is drawn of a feature map, by position or by channel.

Shapes: maps are (C, h, w) of one image without its padding, student S and teacher T.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.losses import attention_map

__all__ = ["channel_response", "counted_positions", "difference", "relative_attention", "selectivity"]


def relative_attention(features: Tensor) -> Tensor:
    """
    AT's attention map ``sum_c A_c^2`` (arXiv 1612.03928, section 3.1) as a multiple of its mean over positions, (h, w),
    so that maps of different networks share a scale. Zeros for a map that is all zeros.
    """
    return _over_mean(attention_map(features[None])[0])


def channel_response(features: Tensor, channel: int) -> Tensor:
    """The magnitude of one channel as a multiple of its mean, (h, w)."""
    return _over_mean(features[channel].float().abs())


def selectivity(features: Tensor) -> Tensor:
    """
    How far each channel singles out few positions, (C,): the peak of its magnitude over the mean, from 1 (the same
    everywhere) to h w (one position). NST (arXiv 1707.01219) compares where neurons respond, after each channel is
    divided by its norm (equation 4); the paper names no measure of selectivity, and this one does not depend on that
    norm. 0 for a channel that is all zeros.
    """
    magnitude = features.float().abs().flatten(1)
    return magnitude.amax(1) / magnitude.mean(1).clamp(min=torch.finfo(torch.float32).tiny)


def difference(first: Tensor, second: Tensor) -> Tensor:
    """``first - second`` of two maps (h, w); the larger one is average-pooled to the smaller."""
    size = [min(sides) for sides in zip(first.shape, second.shape)]
    first, second = (F.adaptive_avg_pool2d(x[None], size)[0] for x in (first, second))
    return first - second


def counted_positions(student: Tensor, target: Tensor) -> Tensor:
    """
    The share of channels, (h, w), in which OFD's partial L2 distance counts a position (arXiv 1904.01866, equation 3):
    everywhere but where S <= T <= 0.

    Args:
        student: S, pre-activation, behind its connector.
        target: T, behind the margin ReLU, with the same channels. The larger map is average-pooled to the smaller.
    """
    size = [min(sides) for sides in zip(student.shape[1:], target.shape[1:])]
    student, target = (F.adaptive_avg_pool2d(x, size) for x in (student, target))
    return 1 - ((student <= target) & (target <= 0)).float().mean(0)


def _over_mean(x: Tensor) -> Tensor:
    return x / x.mean().clamp(min=torch.finfo(torch.float32).tiny)
