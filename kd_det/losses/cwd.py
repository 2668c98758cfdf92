"""CWD, channel-wise knowledge distillation for dense prediction: arXiv 2011.13256."""

from collections.abc import Sequence
from typing import Optional

import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from kd_det.connectors import connect_where_different
from kd_det.losses._spatial import full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, NO_IMAGES, DistillationLoss, tap_channels

__all__ = ["CWDLoss", "cwd_loss"]


@full_precision
def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, valid: Optional[Tensor] = None) -> Tensor:
    """
    ``T^2 KL(t || s)`` between the softmax of each channel over positions (equations 3 and 4), averaged over channels
    and images.

    Args:
        student: (N, C, Hs, Ws), behind a connector.
        teacher: (N, C, Ht, Wt); is detached. The larger map is average-pooled to the smaller.
        temperature: T > 0.
        valid: bool (N, 1, H, W) at either size: the positions that hold image, over which the softmax goes.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: a temperature that is not positive; batches, channels, types or a mask that do not fit.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"cwd_loss: the temperature must be a positive number, found {temperature}.")
    maps = match_maps("cwd_loss", student, teacher, valid, same_channels=True)
    if maps.empty:
        return zero_loss(maps.student)
    log_s, log_t = (_log_softmax(x / temperature, maps.invalid) for x in (maps.student, maps.teacher))
    divergence = log_t.exp() * (log_t - log_s)
    if maps.invalid is not None:
        divergence = divergence.masked_fill(maps.invalid.flatten(2), 0)
    return temperature**2 * divergence.sum(2).mean()


def _log_softmax(x: Tensor, invalid: Optional[Tensor]) -> Tensor:
    if invalid is not None:
        # The lowest number rather than -inf, whose differences are NaN.
        x = x.masked_fill(invalid, -1e30)
    return F.log_softmax(x.flatten(2), dim=2)


@DISTILLATION_LOSS_REGISTRY.register()
class CWDLoss(DistillationLoss):
    """:func:`cwd_loss` summed over the pairs of taps, behind a connector where the channels differ."""

    name = "cwd"

    @configurable
    def __init__(
        self,
        *,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        temperature: float = 1.0,
        connector_norm: str = "",
        **kwargs,
    ):
        """
        Args:
            student_channels, teacher_channels: one number a tap.
            temperature: T of :func:`cwd_loss`.
            connector_norm: a norm of Detectron2 behind each 1x1 convolution; "": none.
            kwargs: see :class:`DistillationLoss`.
        """
        super().__init__(**kwargs)
        self.connectors = connect_where_different(student_channels, teacher_channels, norm=connector_norm)
        cwd_loss(NO_IMAGES, NO_IMAGES, temperature=temperature)  # checks the option
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg, student, teacher):
        ret = super().from_config(cfg, student, teacher)
        node = cfg.KD.CWD
        options = {"temperature": node.TEMPERATURE, "connector_norm": node.CONNECTOR_NORM}
        return {**ret, **tap_channels(ret, student, teacher), **options}

    def forward(self, student, teacher, regions):
        pairs = self.pairs(student, teacher, regions)
        return sum(
            cwd_loss(connector(s), t, temperature=self.temperature, valid=valid)
            for connector, (s, t, valid) in zip(self.connectors, pairs)
        )
