"""PKD, general distillation framework for object detectors via Pearson correlation coefficient: arXiv 2207.02039."""

from typing import Optional, Tuple

import torch
from detectron2.utils import comm
from torch import Tensor

from kd_det.losses._gradients import with_gradient
from kd_det.losses._ranks import max_over_ranks, sum_over_ranks
from kd_det.losses._spatial import Maps, full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.connected import ConnectedLoss
from kd_det.losses.regions import RegionsLoss

__all__ = ["PKDLoss", "pkd_loss"]


@full_precision
def pkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Optional[Tensor] = None,
    weights: Optional[Tensor] = None,
    all_ranks: bool = False,
) -> Tensor:
    """
    Half the mean squared error between both maps, each channel standardised over the batch and its positions (equation
    4), which is 1 - Pearson's correlation of the channel.

    Args:
        student: (N, C, Hs, Ws).
        teacher: (N, C, Ht, Wt); is detached. The larger map is average-pooled to the smaller.
        valid: bool (N, 1, H, W) at either size: the positions that hold image. Others count neither in the statistics
            nor in the mean.
        weights: float (N, 1, H, W) at either size, scaled to a mean of 1 in each image: the statistics and the mean
            are weighted.
        all_ranks: the batch is that of all ranks together, which must all call this; gradients are as DDP averages
            them.

    Returns:
        A scalar; 0 for an empty batch. A constant channel is standardised to zeros and gets zero gradient.

    Raises:
        ValueError: batches, channels, types or a mask that do not fit.
    """
    maps = match_maps("pkd_loss", student, teacher, valid, same_channels=True, weights=weights)
    if maps.empty:
        return zero_loss(maps.student)
    return with_gradient(maps.student, lambda s: _one_minus_correlation(s, maps, all_ranks))


def _one_minus_correlation(student: Tensor, maps: Maps, all_ranks: bool) -> Tuple[Tensor, Tensor]:
    """
    The loss and its gradient. With z the standardised maps, n the positions of a channel and r its correlation, the
    gradient of ``mean_c |z_s - z_t|^2 / 2 n`` by the student is ``(r z_s - z_t) / (C n sigma_s)``.
    """
    sum_up, peak_of = (sum_over_ranks, max_over_ranks) if all_ranks else (lambda x: x, lambda x: x)
    n, c, h, w = student.shape
    weights = maps.weights
    invalid = maps.invalid if weights is None else weights == 0
    s, t = (x.clone() if invalid is None else x.masked_fill(invalid, 0) for x in (student, maps.teacher))
    # The correlation does not depend on the scale: this keeps squares from under- and overflow.
    peaks = peak_of(torch.stack([torch.linalg.vector_norm(x, torch.inf, (0, 2, 3)) for x in (s, t)]))
    peaks = peaks.clamp(min=torch.finfo(s.dtype).tiny)
    for x, peak in zip((s, t), peaks):
        x.div_(peak[:, None, None])
    if weights is None:
        totals = [x.sum((0, 2, 3)) for x in (s, t)]
        positions = s.new_full((c,), n * h * w) if invalid is None else maps.valid.sum().to(s.dtype).expand(c)
    else:
        totals = [torch.einsum("nchw,nuhw->c", x, weights) for x in (s, t)]
        positions = weights.sum().expand(c)
        root = weights.sqrt()
    sums = sum_up(torch.stack([*totals, positions]))
    count = sums[2].clamp(min=1)
    for x, mean in zip((s, t), sums[:2] / count):
        x.sub_(mean[:, None, None])
        if weights is not None:
            x.mul_(root)
        elif invalid is not None:
            x.masked_fill_(invalid, 0)
    products = sum_up(torch.stack([(x * y).sum((0, 2, 3)) for x, y in ((s, s), (t, t), (s, t))])) / count
    # Below the rounding of the mean, nothing is left but noise: such a channel is constant.
    varies = products[:2] > (4 * torch.finfo(s.dtype).eps) ** 2
    inverse = varies * torch.where(varies, products[:2], 1).rsqrt()
    correlation = products[2] * inverse[0] * inverse[1]
    s.mul_((correlation * inverse[0])[:, None, None]).sub_(t.mul_(inverse[1][:, None, None]))
    # DDP averages the ranks' gradients, and each rank has its own positions only.
    scale = inverse[0] / (peaks[0] * count) * ((comm.get_world_size() if all_ranks else 1) / c)
    if weights is not None:
        s.mul_(root)
    return (varies.sum(0) / 2 - correlation).mean().clamp(min=0), s.mul_(scale[:, None, None])


@DISTILLATION_LOSS_REGISTRY.register()
class PKDLoss(RegionsLoss, ConnectedLoss):
    """:func:`pkd_loss` summed over the pairs of taps, behind a connector where the channels differ."""

    name = "pkd"

    def forward(self, student, teacher, context):
        pairs = self.connected_pairs(student, teacher, context)
        return sum(
            pkd_loss(s, t, valid=valid, weights=self.weights_at(s, context), all_ranks=True) for s, t, valid in pairs
        )
