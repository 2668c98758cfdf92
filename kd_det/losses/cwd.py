"""CWD, channel-wise knowledge distillation for dense prediction: arXiv 2011.13256."""

from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from kd_det.losses._spatial import full_precision, match_maps, zero_loss

__all__ = ["cwd_loss"]


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
