"""ReviewKD, distilling knowledge via knowledge review: arXiv 2104.09044."""

from collections.abc import Sequence
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d
from torch import Tensor, nn

from kd_det.features.connectors import build_connector
from kd_det.losses._spatial import full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.connected import ConnectedLoss
from kd_det.losses.hint import hint_loss

__all__ = ["ReviewKDLoss", "hierarchical_context_loss"]

# Sizes that maps are average-pooled to, and the weights of these terms; that of the whole map is 1.
_POOLED = {4: 1 / 2, 2: 1 / 4, 1: 1 / 8}


@full_precision
def hierarchical_context_loss(
    student_levels: Sequence[Tensor],
    teacher_levels: Sequence[Tensor],
    *,
    valid: Optional[Sequence[Optional[Tensor]]] = None,
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
    total = 0.0
    for student, teacher, mask in zip(student_levels, teacher_levels, valid):
        maps = match_maps(name, student, teacher, mask, same_channels=True)
        if maps.empty:
            total = total + zero_loss(maps.student)
        elif maps.valid is None:
            total = total + _level_loss(maps.student, maps.teacher)
        else:
            images = [
                _level_loss(*(_valid_part(x[i], maps.valid[i, 0]) for x in (maps.student, maps.teacher)))
                for i in range(len(maps.student))
            ]
            total = total + sum(images) / len(images)
    return total


def _valid_part(image: Tensor, mask: Tensor) -> Tensor:
    height, width = (int(mask.any(dim=dim).sum()) for dim in (1, 0))
    return image[None, :, :height, :width]


def _level_loss(student: Tensor, teacher: Tensor) -> Tensor:
    loss, weights = hint_loss(student, teacher), 1.0
    for size, weight in _POOLED.items():
        if size < min(student.shape[2:]):
            pooled = (F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
            loss, weights = loss + weight * hint_loss(*pooled), weights + weight
    return loss / weights


class _Fusion(nn.Module):
    """
    One level of the review (attention-based fusion, section 3.3): the level and the deeper ones' residual, weighted
    position by position.
    """

    def __init__(self, student_channels: int, teacher_channels: int, mid_channels: int, *, norm: str, deepest: bool):
        super().__init__()
        self.reduce = build_connector(student_channels, mid_channels, norm=norm)
        self.expand = build_connector(mid_channels, teacher_channels, norm=norm, kernel_size=3)
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
            x = x * own + deeper * residual
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
            _Fusion(cs, ct, self.mid_channels, norm=self.connector_norm, deepest=level == deepest)
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
        return hierarchical_context_loss(levels, [t for _, t, _ in pairs], valid=[valid for _, _, valid in pairs])
