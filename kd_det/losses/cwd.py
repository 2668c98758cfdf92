"""CWD, channel-wise knowledge distillation for dense prediction: arXiv 2011.13256."""

from typing import Optional

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from kd_det.losses._spatial import Maps, full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, NO_IMAGES
from kd_det.losses.connected import ConnectedLoss
from kd_det.losses.regions import RegionsLoss

__all__ = ["CWDLoss", "cwd_loss"]


@full_precision
def cwd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    valid: Optional[Tensor] = None,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """
    ``T^2 KL(t || s)`` between the softmax of each channel over positions (equations 3 and 4), averaged over channels
    and images.

    Args:
        student: (N, C, Hs, Ws), behind a connector.
        teacher: (N, C, Ht, Wt); is detached. The larger map is average-pooled to the smaller.
        temperature: T > 0.
        valid: bool (N, 1, H, W) at either size: the positions that hold image, over which the softmax goes.
        weights: float (N, 1, H, W) at either size: the softmax is proportional to ``weights exp(features / T)``, as if
            a position stood there so many times.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: a temperature that is not positive; batches, channels, types or a mask that do not fit.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"cwd_loss: the temperature must be a positive number, found {temperature}.")
    maps = match_maps("cwd_loss", student, teacher, valid, same_channels=True, weights=weights)
    if maps.empty:
        return zero_loss(maps.student)
    log_s, log_t = (_log_softmax(x, temperature, maps) for x in (maps.student, maps.teacher))
    divergence = log_t.exp() * (log_t - log_s)
    if maps.invalid is not None:
        divergence = divergence.masked_fill(maps.invalid.flatten(2), 0)
    return temperature * temperature * divergence.sum(2).mean()


def _log_softmax(x: Tensor, temperature: float, maps: Maps) -> Tensor:
    # The lowest number rather than -inf, whose differences are NaN.
    if maps.weights is None:
        x = x / temperature
    else:
        x = torch.add(maps.weights.log().clamp(min=-1e30), x, alpha=1 / temperature)
    if maps.invalid is not None:
        x = x.masked_fill(maps.invalid, -1e30)
    return F.log_softmax(x.flatten(2), dim=2)


@DISTILLATION_LOSS_REGISTRY.register()
class CWDLoss(RegionsLoss, ConnectedLoss):
    """:func:`cwd_loss` summed over the pairs of taps, behind a connector where the channels differ."""

    name = "cwd"

    @configurable
    def __init__(self, *, temperature: float = 1.0, **kwargs):
        """
        Args:
            temperature: T of :func:`cwd_loss`.
            kwargs: see :class:`ConnectedLoss`.
        """
        super().__init__(**kwargs)
        cwd_loss(NO_IMAGES, NO_IMAGES, temperature=temperature)  # checks the option
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return {**super().from_config(cfg, student, teacher), "temperature": cfg.KD.CWD.TEMPERATURE}

    def forward(self, student, teacher, context):
        pairs = self.connected_pairs(student, teacher, context)
        return sum(
            cwd_loss(s, t, temperature=self.temperature, valid=valid, weights=self.weights_at(s, context))
            for s, t, valid in pairs
        )
