"""
FGD, focal and global knowledge distillation for detectors: arXiv 2111.11837.

Shapes: maps are (N, C, H, W); G boxes in an image.
"""

from collections.abc import Sequence
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.features.context import to_device, valid_mask
from kd_det.losses._blocks import squared_error
from kd_det.losses._spatial import Maps, full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, NO_IMAGES
from kd_det.losses.connected import ConnectedLoss

__all__ = ["FGDLoss", "fgd_loss"]


@full_precision
def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    boxes: Sequence[Tensor],
    canvas: Tuple[int, int],
    *,
    temperature: float = 0.5,
    alpha: float = 5e-5,
    beta: float = 2.5e-5,
    gamma: float = 5e-5,
    valid: Optional[Tensor] = None,
) -> Tensor:
    """
    The focal part of FGD (section 3.1): squared error weighted by the teacher's spatial and channel attention, apart
    for the ground truth and for the background, and the L1 distance between both networks' attentions. Sums over
    positions and channels, averaged over images, as published. The default weights are the published ones for
    two-stage detectors; one-stage detectors take 1e-3, 5e-4 and 5e-4.

    The published code scales boxes by the image's own size, which misses the object where a batch is padded; here they
    are scaled by the padded size, which is what the map covers.

    Args:
        student: (N, C, Hs, Ws), behind a connector.
        teacher: (N, C, Ht, Wt); is detached. The larger map is average-pooled to the smaller.
        boxes: for each image (G, 4), x1, y1, x2, y2 in pixels. A position in several boxes counts by the smallest.
        canvas: height and width in pixels of what the maps cover: of the padded batch.
        temperature: T of the attentions' softmax.
        alpha, beta, gamma: weights of the foreground, the background, and the attentions.
        valid: bool (N, 1, H, W) at either size: the positions that hold image.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: another number of boxes' tensors than images, a temperature that is not positive; batches, channels,
            types or a mask that do not fit.
    """
    maps = match_maps("fgd_loss", student, teacher, valid, same_channels=True)
    if len(boxes) != len(maps.student):
        raise ValueError(f"fgd_loss: needs the boxes of {len(maps.student)} images, found those of {len(boxes)}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"fgd_loss: the temperature must be a positive number, found {temperature}.")
    if maps.empty:
        return zero_loss(maps.student)
    mask = None if maps.valid is None else maps.valid[:, 0].cpu()
    weights = _region_weights(boxes, canvas, maps.student.shape[2:], mask, alpha, beta).to(maps.student)
    student, teacher = _without_padding(maps)
    return _focal(student, teacher, maps, weights, temperature, gamma)


def _without_padding(maps: Maps) -> Tuple[Tensor, Tensor]:
    if maps.valid is None:
        return maps.student, maps.teacher
    return maps.student.masked_fill(maps.invalid, 0), maps.teacher.masked_fill(maps.invalid, 0)


def _focal(student: Tensor, teacher: Tensor, maps: Maps, weights: Tensor, temperature: float, gamma: float) -> Tensor:
    """
    Args:
        student, teacher: those of ``maps``, 0 where it holds no image.
        weights: (N, H, W), see :func:`_region_weights`.
    """
    n, c = student.shape[:2]
    positions = maps.positions()
    spatial_s, channel_s = _attention(student, temperature, maps.invalid, positions)
    spatial_t, channel_t = _attention(teacher, temperature, maps.invalid, positions)
    # Attentions have a mean of 1 as published: these probabilities are multiplied by the number of entries.
    weights = (spatial_t * weights.flatten(1) * positions[:, None])[:, :, None]
    error = (student - teacher).square().flatten(2) @ weights
    spatial = (spatial_s - spatial_t).abs().sum(1).dot(positions)
    channel = (channel_s - channel_t).abs().sum()
    return ((error[:, :, 0] * channel_t).sum() * c + gamma * (spatial + c * channel)) / n


def _attention(x: Tensor, temperature: float, invalid: Optional[Tensor], positions: Tensor) -> Tuple[Tensor, Tensor]:
    """Softmaxes of mean magnitudes over positions, (N, H W), and over channels, (N, C)."""
    magnitude = x.abs()
    over_positions = magnitude.mean(1).flatten(1) / temperature
    if invalid is not None:
        over_positions = over_positions.masked_fill(invalid.flatten(1), torch.finfo(x.dtype).min)
    over_channels = magnitude.sum((2, 3)) / (temperature * positions[:, None])
    return over_positions.softmax(1), over_channels.softmax(1)


def _region_weights(
    boxes: Sequence[Tensor],
    canvas: Tuple[int, int],
    size: Tuple[int, int],
    valid: Optional[Tensor],
    alpha: float,
    beta: float,
) -> Tensor:
    """
    (N, H, W), on the host: alpha / area, in positions, of the smallest box that a position lies in; beta / (number of
    such positions) outside of all boxes; 0 where there is no image.
    """
    foreground = torch.zeros(len(boxes), *size)
    scale = torch.tensor([size[1] / canvas[1], size[0] / canvas[0]]).repeat(2)
    for mask, image_boxes in zip(foreground, boxes):
        scaled = image_boxes.detach().float().cpu() * scale
        for (x1, y1), (x2, y2) in zip(scaled[:, :2].floor().long().tolist(), scaled[:, 2:].ceil().long().tolist()):
            # Both ends belong to the box, as in the published code.
            inside = mask[max(y1, 0) : y2 + 1, max(x1, 0) : x2 + 1]
            inside.clamp_(min=1 / ((y2 + 1 - y1) * (x2 + 1 - x1)))
    background = foreground == 0
    if valid is not None:
        foreground, background = foreground * valid, background & valid
    return alpha * foreground + beta * background / background.sum((1, 2), keepdim=True).clamp(min=1)


class _GlobalContext(nn.Module):
    """What the whole map adds to each channel (the global context block of GCNet, arXiv 1904.11492)."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 2)
        self.attention = nn.Linear(channels, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        nn.init.kaiming_normal_(self.attention.weight, nonlinearity="relu")
        nn.init.zeros_(self.attention.bias)
        # The block starts as the identity.
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: Tensor, invalid: Optional[Tensor]) -> Tensor:
        """(N, C, H, W), finite where it is invalid, to (N, C)."""
        x = x.flatten(2)
        logits = F.conv1d(x, self.attention.weight[..., None], self.attention.bias)
        if invalid is not None:
            logits = logits.masked_fill(invalid.flatten(2), torch.finfo(x.dtype).min)
        return self.transform((x @ logits.softmax(2).mT)[:, :, 0])


@DISTILLATION_LOSS_REGISTRY.register()
class FGDLoss(ConnectedLoss):
    """
    :func:`fgd_loss` on the ground truth and the global relation (section 3.2), summed over the pairs of taps; behind a
    connector where the channels differ. Both networks' global context blocks are trained, as published.
    """

    name = "fgd"

    @configurable
    def __init__(
        self,
        *,
        temperature: float = 0.5,
        alpha: float = 5e-5,
        beta: float = 2.5e-5,
        gamma: float = 5e-5,
        relation: float = 5e-7,
        **kwargs,
    ):
        """
        Args:
            temperature, alpha, beta, gamma: see :func:`fgd_loss`.
            relation: lambda, the weight of the global relation.
            kwargs: see :class:`ConnectedLoss`.
        """
        super().__init__(**kwargs)
        self.options = {"temperature": temperature, "alpha": alpha, "beta": beta, "gamma": gamma}
        fgd_loss(NO_IMAGES, NO_IMAGES, (), (1, 1), **self.options)  # checks the options
        self.relation = relation

    def build(self, student_channels, teacher_channels):
        super().build(student_channels, teacher_channels)
        self.student_contexts, self.teacher_contexts = (
            nn.ModuleList(_GlobalContext(channels) for channels in teacher_channels) for _ in range(2)
        )

    @classmethod
    def from_config(cls, cfg, student, teacher):
        ret = super().from_config(cfg, student, teacher)
        node = cfg.KD.FGD
        options = ("TEMPERATURE", "ALPHA", "BETA", "GAMMA", "RELATION")
        return {**ret, **{option.lower(): node[option] for option in options}}

    def forward(self, student, teacher, context):
        boxes = [instances.gt_boxes.tensor for instances in context.ground_truth()]
        pairs = self.connected_pairs(student, teacher, context)
        levels = [match_maps("FGDLoss", *pair, same_channels=True) for pair in pairs]
        if levels[0].empty:
            return sum(zero_loss(maps.student) for maps in levels)
        return self._sum_of_levels(levels, self._weights(levels, boxes, context))

    def _weights(self, levels: Sequence[Maps], boxes: Sequence[Tensor], context) -> List[Tensor]:
        """:func:`_region_weights` of every level, copied to the device all at once."""
        made = []
        for maps in levels:
            size = tuple(maps.student.shape[2:])
            valid = None if maps.valid is None else valid_mask(context.image_sizes, context.canvas, size)[:, 0]
            made.append(
                _region_weights(boxes, context.canvas, size, valid, self.options["alpha"], self.options["beta"])
            )
        student = levels[0].student
        flat = to_device(torch.cat([weights.flatten() for weights in made]).to(student.dtype), student.device)
        return [x.view(w.shape) for x, w in zip(flat.split([w.numel() for w in made]), made)]

    @full_precision
    def _sum_of_levels(self, levels: Sequence[Maps], weights: Sequence[Tensor]) -> Tensor:
        total = 0.0
        for level, (maps, level_weights) in enumerate(zip(levels, weights)):
            s, t = _without_padding(maps)
            focal = _focal(s, t, maps, level_weights, self.options["temperature"], self.options["gamma"])
            contexts = self.student_contexts[level](s, maps.invalid), self.teacher_contexts[level](t, maps.invalid)
            shifted = s + (contexts[0] - contexts[1])[:, :, None, None]
            each = s.new_full((len(s),), 1 / len(s))
            total = total + focal + self.relation * squared_error(shifted, t, each, maps.invalid)
        return total
