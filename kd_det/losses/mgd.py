"""MGD, masked generative distillation: arXiv 2205.01529."""

from collections.abc import Callable
from typing import Optional

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.losses._blocks import squared_error
from kd_det.losses._spatial import Maps, full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, NO_IMAGES
from kd_det.losses.connected import ConnectedLoss
from kd_det.losses.regions import RegionsLoss

__all__ = ["MGDLoss", "mgd_loss"]


def mgd_loss(
    student: Tensor,
    teacher: Tensor,
    generation: Callable[[Tensor], Tensor],
    *,
    mask_ratio: float = 0.45,
    valid: Optional[Tensor] = None,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """
    The squared error of the teacher's map as generated from the student's, of which random positions are hidden
    (section 3): summed over channels and positions, averaged over images, as published.

    Args:
        student: (N, C, H, W), behind a connector.
        teacher: (N, C, Ht, Wt); is detached. The larger map is average-pooled to the smaller.
        generation: from (N, C, H, W) to the same shape.
        mask_ratio: the share of positions that are hidden, lambda in 0 <= lambda < 1: 0.45 for two-stage, 0.65 for
            one-stage detectors. Positions are drawn from torch's global generator.
        valid: bool (N, 1, H, W) at either size: the positions that hold image. The others are hidden, and generate
            nothing.
        weights: float (N, 1, H, W) at either size, scaled to a mean of 1 in each image, of the squared errors; what is
            hidden does not depend on them.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: a ratio out of range; batches, channels, types or a mask that do not fit.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mgd_loss: the mask ratio must be in 0 <= ratio < 1, found {mask_ratio}.")
    maps = match_maps("mgd_loss", student, teacher, valid, same_channels=True, weights=weights)
    if maps.empty:
        return zero_loss(maps.student)
    n, _, h, w = maps.student.shape
    hidden = torch.rand(n, 1, h, w, device=maps.student.device) < mask_ratio
    if maps.invalid is not None:
        hidden |= maps.invalid
    generated = generation(maps.student.masked_fill(hidden, 0))
    if generated.shape != maps.teacher.shape:
        raise ValueError(
            f"mgd_loss: the generation must give maps of shape {tuple(maps.teacher.shape)}, found "
            f"{tuple(generated.shape)}."
        )
    maps = Maps(generated.to(maps.teacher.dtype), *maps[1:])
    return full_precision(squared_error)(maps, maps.student.new_full((n,), 1 / n))


@DISTILLATION_LOSS_REGISTRY.register()
class MGDLoss(RegionsLoss, ConnectedLoss):
    """
    :func:`mgd_loss` summed over the pairs of taps; behind a connector where the channels differ. It owns the generation
    of each: 3x3 convolution, ReLU, 3x3 convolution.
    """

    name = "mgd"

    @configurable
    def __init__(self, *, mask_ratio: float = 0.45, **kwargs):
        """
        Args:
            mask_ratio: see :func:`mgd_loss`.
            kwargs: see :class:`ConnectedLoss`.
        """
        super().__init__(**kwargs)
        mgd_loss(NO_IMAGES, NO_IMAGES, nn.Identity(), mask_ratio=mask_ratio)  # checks the ratio
        self.mask_ratio = mask_ratio

    def build(self, student_channels, teacher_channels):
        super().build(student_channels, teacher_channels)
        self.generations = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1))
            for c in teacher_channels
        )

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return {**super().from_config(cfg, student, teacher), "mask_ratio": cfg.KD.MGD.MASK_RATIO}

    def forward(self, student, teacher, context):
        pairs = zip(self.generations, self.connected_pairs(student, teacher, context))
        return sum(
            mgd_loss(s, t, generation, mask_ratio=self.mask_ratio, valid=valid, weights=self.weights_at(s, context))
            for generation, (s, t, valid) in pairs
        )
