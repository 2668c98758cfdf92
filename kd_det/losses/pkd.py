"""PKD, general distillation framework for object detectors via Pearson correlation coefficient: arXiv 2207.02039."""

import functools
from typing import Optional

import torch
from torch import Tensor

from kd_det.losses._ranks import mean_over_ranks, peak_over_ranks
from kd_det.losses._spatial import full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.connected import ConnectedLoss

__all__ = ["PKDLoss", "pkd_loss"]


@full_precision
def pkd_loss(student: Tensor, teacher: Tensor, *, valid: Optional[Tensor] = None, all_ranks: bool = False) -> Tensor:
    """
    Half the mean squared error between both maps, each channel standardised over the batch and its positions (equation
    4), which is 1 - Pearson's correlation of the channel.

    Args:
        student: (N, C, Hs, Ws).
        teacher: (N, C, Ht, Wt); is detached. The larger map is average-pooled to the smaller.
        valid: bool (N, 1, H, W) at either size: the positions that hold image. Others count neither in the statistics
            nor in the mean.
        all_ranks: the batch is that of all ranks together, which must all call this; gradients are as DDP averages
            them.

    Returns:
        A scalar; 0 for an empty batch. A constant channel is standardised to zeros and gets zero gradient.

    Raises:
        ValueError: batches, channels, types or a mask that do not fit.
    """
    maps = match_maps("pkd_loss", student, teacher, valid, same_channels=True)
    if maps.empty:
        return zero_loss(maps.student)
    channels, positions = (x.transpose(0, 1).flatten(1) for x in (maps.student, maps.teacher)), None
    if maps.valid is not None:
        positions = maps.valid.flatten()
        channels = (x[:, positions] for x in channels)
    student, teacher = (_standardise(x, all_ranks) for x in channels)
    return (student - teacher).square().sum() / (2 * max(1, student.numel()))


def _standardise(x: Tensor, all_ranks: bool) -> Tensor:
    """(C, P) to mean 0 and variance 1 (of the population) per channel; a constant channel to 0, without gradient."""
    if x.shape[1] == 0 and not all_ranks:
        return x
    # Pearson's correlation does not depend on the scale, so the peak needs no gradient.
    peak = peak_over_ranks(x) if all_ranks else x.detach().abs().amax(1, keepdim=True)
    mean = mean_over_ranks if all_ranks else functools.partial(torch.mean, dim=1, keepdim=True)
    x = x / peak.clamp(min=torch.finfo(x.dtype).tiny)
    x = x - mean(x)
    variance = mean(x.square())
    # Below the rounding of the mean, nothing is left but noise.
    varies = variance > (4 * torch.finfo(x.dtype).eps) ** 2
    return x * (varies * torch.where(varies, variance, 1).rsqrt())


@DISTILLATION_LOSS_REGISTRY.register()
class PKDLoss(ConnectedLoss):
    """:func:`pkd_loss` summed over the pairs of taps, behind a connector where the channels differ."""

    name = "pkd"

    def forward(self, student, teacher, context):
        pairs = self.pairs(student, teacher, context)
        maps = ((c(s), t, valid) for c, (s, t, valid) in zip(self.connectors, pairs))
        return sum(pkd_loss(s, t, valid=valid, all_ranks=True) for s, t, valid in maps)
