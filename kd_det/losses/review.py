"""ReviewKD, distilling knowledge via knowledge review: arXiv 2104.09044."""

import functools
from collections.abc import Sequence
from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d
from torch import Tensor, nn

from kd_det.features.connectors import build_connector
from kd_det.features.context import to_device, valid_sizes
from kd_det.losses._gradients import with_gradient
from kd_det.losses._spatial import Maps, full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.connected import ConnectedLoss

__all__ = ["ReviewKDLoss", "hierarchical_context_loss"]

# Sizes that maps are average-pooled to, and the weights of these terms; that of the whole map is 1.
_POOLED = {4: 1 / 2, 2: 1 / 4, 1: 1 / 8}


@full_precision
def hierarchical_context_loss(
    student_levels: Sequence[Tensor],
    teacher_levels: Sequence[Tensor],
    *,
    valid: Optional[Sequence[Optional[Tensor]]] = None,
    valid_sizes: Optional[Sequence[Sequence[Tuple[int, int]]]] = None,
) -> Tensor:
    """
    Mean squared error of whole maps and of maps average-pooled to 4x4, 2x2 and 1x1 (section 3.3), with the weights 1,
    1/2, 1/4 and 1/8 divided by their sum, summed over levels. A pooled size that is not smaller than the map is left
    out. (The published code then moves the weights of the smaller sizes up by one; here a size keeps its weight.)

    Args:
        student_levels: maps (N, C, Hs, Ws), behind their connectors.
        teacher_levels: as many maps (N, C, Ht, Wt); are detached. The larger map is average-pooled to the smaller.
        valid: for each level None or bool (N, 1, H, W), whose true positions are a rectangle from the first row and
            column on: pooling cuts this rectangle and not the padded map.
        valid_sizes: for each level, height and width of each image's rectangle at the smaller map. None: they are read
            from the masks, for which the host waits.

    Returns:
        A scalar, averaged over images; 0 for an empty batch.

    Raises:
        ValueError: numbers of levels that differ, none at all; batches, channels, types or a mask that do not fit.
    """
    name = "hierarchical_context_loss"
    valid = [None] * len(student_levels) if valid is None else valid
    if not student_levels or not len(student_levels) == len(teacher_levels) == len(valid):
        raise ValueError(
            f"{name}: needs one teacher level (and mask) for each student level, found {len(student_levels)} of the "
            f"student, {len(teacher_levels)} of the teacher and {len(valid)} masks."
        )
    levels = [match_maps(name, *level, same_channels=True) for level in zip(student_levels, teacher_levels, valid)]
    if levels[0].empty:
        return sum(zero_loss(maps.student) for maps in levels)
    if valid_sizes is None:
        valid_sizes = [_valid_sizes(maps) for maps in levels]
    poolings = _poolings(levels, valid_sizes)
    terms = [
        with_gradient(maps.student, functools.partial(_level_loss, maps, pooling))
        for maps, pooling in zip(levels, poolings)
    ]
    return torch.stack(terms).sum()


def _level_loss(maps: Maps, pooling: "_Pooling", student: Tensor) -> Tuple[Tensor, Tensor]:
    """The loss of a level, a quadratic form of the maps' difference, and its gradient."""
    difference = (student - maps.teacher).contiguous()
    if maps.invalid is not None:
        difference.masked_fill_(maps.invalid, 0)
    weighted = difference * pooling.whole[:, None, None, None]
    value = difference.flatten().dot(weighted.flatten())
    if not pooling.bins.numel():
        return value, 2 * weighted
    # Pooling is linear, so the pooled maps' difference is the pooled difference: columns first, then rows.
    n, c, h, w = difference.shape
    pooled = (difference.view(n, c * h, w) @ pooling.columns).view(n, c, h, -1)
    pooled = (pooling.rows @ pooled.transpose(1, 2).flatten(2)).unflatten(2, (c, -1))
    weighted_pooled = pooled * pooling.bins
    value = value + pooled.flatten().dot(weighted_pooled.flatten())
    spread = (pooling.rows.mT @ weighted_pooled.flatten(2)).unflatten(2, (c, -1)).transpose(1, 2).flatten(1, 2)
    gradient = torch.baddbmm(weighted.view(n, c * h, w), spread, pooling.columns.mT, beta=2, alpha=2)
    return value, gradient.view_as(difference)


class _Pooling(NamedTuple):
    """
    Adaptive average pooling of a level to all sizes at once, by matrices: B is the number of the sizes' rows (or
    columns) together.

    Attributes:
        columns: (N, W, B).
        rows: (N, B, H).
        bins: (N, B, 1, B), the factors of squares of pooled values; 0 where row and column are of two sizes.
        whole: (N,), the factors of the images' sums of squares.
    """

    columns: Tensor
    rows: Tensor
    bins: Tensor
    whole: Tensor


def _valid_sizes(maps: Maps) -> List[Tuple[int, int]]:
    n, _, h, w = maps.student.shape
    if maps.valid is None:
        return [(h, w)] * n
    mask = maps.valid[:, 0].cpu()
    return list(zip(mask.any(2).sum(1).tolist(), mask.any(1).sum(1).tolist()))


def _poolings(levels: Sequence[Maps], valid_sizes: Sequence[Sequence[Tuple[int, int]]]) -> List[_Pooling]:
    """Made on the host, and copied to the device all at once."""
    made = [_pooling(tuple(maps.student.shape), sizes) for maps, sizes in zip(levels, valid_sizes)]
    student = levels[0].student
    flat = to_device(torch.cat([x.flatten() for pooling in made for x in pooling]).to(student.dtype), student.device)
    parts = iter(flat.split([x.numel() for pooling in made for x in pooling]))
    return [_Pooling(*(next(parts).view(x.shape) for x in pooling)) for pooling in made]


def _pooling(shape: Tuple[int, int, int, int], sizes: Sequence[Tuple[int, int]]) -> _Pooling:
    n, c, h, w = shape
    largest = max(map(min, sizes))
    bins = [(i, size) for size in _POOLED if size < largest for i in range(size)]
    index, size = torch.tensor(bins, dtype=torch.int64).view(-1, 2).unbind(1)
    weights = torch.tensor([_POOLED[s] for _, s in bins], dtype=torch.float64)
    heights, widths = torch.tensor(sizes)[:, :, None].unbind(1)

    def averages(lengths: Tensor, positions: int) -> Tensor:
        start, stop = index * lengths // size, -(-(index + 1) * lengths // size)
        position = torch.arange(positions)
        inside = (start[..., None] <= position) & (position < stop[..., None])
        return inside / (stop - start).clamp(min=1).double()[..., None]

    used = weights * (size < torch.minimum(heights, widths))
    total = 1 + (used / size).sum(1)  # each size has as many bins as its number of rows
    factors = used / (size * size) / total[:, None] / (n * c)
    factors = torch.where(size[:, None] == size, factors[:, :, None], 0)
    whole = 1 / (n * c * total * (heights * widths)[:, 0].clamp(min=1))
    return _Pooling(averages(widths, w).mT.contiguous(), averages(heights, h), factors[:, :, None], whole)


class _Fusion(nn.Module):
    """
    One level of the review (attention-based fusion, section 3.3): the level and the deeper ones' residual, weighted
    position by position.
    """

    def __init__(self, student_channels: int, teacher_channels: int, mid_channels: int, *, deepest: bool, **connector):
        super().__init__()
        self.reduce = build_connector(student_channels, mid_channels, **connector)
        self.expand = build_connector(mid_channels, teacher_channels, kernel_size=3, **connector)
        self.attention = None if deepest else Conv2d(2 * mid_channels, 2, kernel_size=1)

    def forward(self, x: Tensor, deeper: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """
        Args:
            x: (N, Cs, H, W), the student's map.
            deeper: (N, mid, h, w), what the next deeper level returned second; None at the deepest.

        Returns:
            (N, Ct, H, W) to compare with the teacher's map, and (N, mid, H, W) for the next shallower level.
        """
        x = self.reduce(x)
        if self.attention is not None:
            deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
            own, residual = self.attention(torch.cat([x, deeper], dim=1)).sigmoid().split(1, dim=1)
            x = torch.addcmul(x * own, deeper, residual)
        return self.expand(x), x


@DISTILLATION_LOSS_REGISTRY.register()
class ReviewKDLoss(ConnectedLoss):
    """
    :func:`hierarchical_context_loss` after the review: each level of the student is fused with its deeper ones before
    it is compared. Taps go from shallow to deep.
    """

    name = "review_kd"

    @configurable
    def __init__(
        self,
        *,
        mid_channels: int = 256,
        connector_norm: str = "BN",
        **kwargs,
    ):
        """
        Args:
            mid_channels: of the fused maps.
            connector_norm: a norm of Detectron2 behind each convolution; "": none.
            kwargs: see :class:`ConnectedLoss`.
        """
        if mid_channels < 1:
            raise ValueError(f"ReviewKDLoss: mid_channels must be at least 1, found {mid_channels}.")
        object.__setattr__(self, "mid_channels", mid_channels)
        super().__init__(connector_norm=connector_norm, **kwargs)

    def build(self, student_channels, teacher_channels):
        deepest = len(self.student_taps) - 1
        self.fusions = nn.ModuleList(
            _Fusion(cs, ct, self.mid_channels, deepest=level == deepest, **self.connector_options)
            for level, (cs, ct) in enumerate(zip(student_channels, teacher_channels))
        )

    @classmethod
    def from_config(cls, cfg, student, teacher):
        ret = super().from_config(cfg, student, teacher)
        node = cfg.KD.REVIEW_KD
        return {**ret, "mid_channels": node.MID_CHANNELS}

    def forward(self, student, teacher, context):
        pairs = self.pairs(student, teacher, context)
        levels: List[Tensor] = []
        fused = None
        for fusion, (s, _, _) in zip(reversed(self.fusions), reversed(pairs)):
            level, fused = fusion(s, fused)
            levels.insert(0, level)
        targets = [t for _, t, _ in pairs]
        sizes = [tuple(map(min, s.shape[2:], t.shape[2:])) for s, t in zip(levels, targets)]
        return hierarchical_context_loss(
            levels,
            targets,
            valid=[valid for _, _, valid in pairs],
            valid_sizes=[valid_sizes(context.image_sizes, context.canvas, size) for size in sizes],
        )
