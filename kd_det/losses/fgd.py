"""
FGD, focal and global knowledge distillation for detectors: arXiv 2111.11837.

Shapes: maps are (N, C, H, W); G boxes in an image.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.features.context import to_device
from kd_det.losses._gradients import with_gradient
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
    return _focal(_join([maps], boxes, canvas), temperature, alpha, beta, gamma)


class _Levels(NamedTuple):
    """L levels side by side, so that the number of kernels does not grow with them; P positions in all."""

    student: Tensor  # (N, C, P), 0 where there is no image
    teacher: Tensor
    inside: Tensor  # (N, L, P), 1 where a position belongs to the level and holds image, else 0
    positions: Tensor  # (N, L), how many those are, at least 1 so that it can divide
    foreground: Tensor  # (N, P), see _foreground

    def softmax(self, logits: Tensor) -> Tensor:
        """(..., N, L or 1, P) to (..., N, L, P), over the positions of each level."""
        return logits.masked_fill(self.inside == 0, torch.finfo(logits.dtype).min).softmax(-1)


def _join(levels: Sequence[Maps], boxes: Sequence[Tensor], canvas: Tuple[int, int]) -> _Levels:
    student, teacher = (torch.cat([maps[i].flatten(2) for maps in levels], 2) for i in range(2))
    foreground = torch.cat([_foreground(boxes, canvas, maps.student.shape[2:]) for maps in levels], 1)
    inside = torch.block_diag(*(torch.ones(1, maps.student[0, 0].numel()) for maps in levels))
    # Both are copied to the device at once.
    host = torch.cat([foreground, inside]).to(student.dtype)
    foreground, inside = to_device(host, student.device).split([len(student), len(levels)])
    inside = inside.expand(len(student), -1, -1)
    if any(maps.valid is not None for maps in levels):
        masks = (torch.ones_like(m.student[:, :1]).bool() if m.valid is None else m.valid for m in levels)
        valid = torch.cat([mask.flatten(2) for mask in masks], 2)
        student, teacher, inside = (x.masked_fill(~valid, 0) for x in (student, teacher, inside))
    return _Levels(student, teacher, inside, inside.sum(2).clamp(min=1), foreground)


def _foreground(boxes: Sequence[Tensor], canvas: Tuple[int, int], size: Tuple[int, int]) -> Tensor:
    """(N, H W) on the host: 1 / area, in positions, of the smallest box that a position lies in; 0 outside of all."""
    masks = torch.zeros(len(boxes), *size)
    scale = torch.tensor([size[1] / canvas[1], size[0] / canvas[0]]).repeat(2)
    for mask, image_boxes in zip(masks, boxes):
        scaled = image_boxes.detach().float().cpu() * scale
        for (x1, y1), (x2, y2) in zip(scaled[:, :2].floor().long().tolist(), scaled[:, 2:].ceil().long().tolist()):
            # Both ends belong to the box, as in the published code.
            inside = mask[max(y1, 0) : y2 + 1, max(x1, 0) : x2 + 1]
            inside.clamp_(min=1 / ((y2 + 1 - y1) * (x2 + 1 - x1)))
    return masks.flatten(1)


def _sums(x: _Levels, magnitude: Tensor) -> Tuple[Tensor, Tensor]:
    """Of |map| over channels, (N, 1, P), and over the positions of each level, (N, C, L)."""
    return magnitude.sum(1, keepdim=True), magnitude @ x.inside.mT


def _attentions(x: _Levels, over_channels: Tensor, over_positions: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    """From :func:`_sums` to (N, L, P) and (N, C, L), whose mean is 1 as published."""
    c = over_positions.shape[1]
    spatial = x.softmax(over_channels / (c * temperature)) * x.positions[..., None]
    return spatial, c * (over_positions / (temperature * x.positions[:, None])).softmax(1)


def _focal(x: _Levels, temperature: float, alpha: float, beta: float, gamma: float) -> Tensor:
    spatial, channel = _attentions(x, *_sums(x, x.teacher.abs()), temperature)
    background = x.inside * (x.foreground == 0)[:, None]
    background = background / background.sum(2, keepdim=True).clamp(min=1)
    weights = spatial * (alpha * x.foreground[:, None] + beta * background)

    def value_and_gradient(student: Tensor) -> Tuple[Tensor, Tensor]:
        # Few maps are written: on a CPU, writing a new one takes longer than its arithmetic.
        scratch = student.abs()
        with torch.enable_grad():
            sums = [y.requires_grad_() for y in _sums(x, scratch)]
            attentions = zip(_attentions(x, *sums, temperature), (spatial, channel))
            distance = gamma * sum((s - t).abs().sum() for s, t in attentions)
        residual = torch.sub(student, x.teacher, out=scratch)
        weighted = (channel @ weights).mul_(residual)
        value = distance.detach() + residual.mul_(weighted).sum()
        by_magnitude = torch.baddbmm(*torch.autograd.grad(distance, sums), x.inside)
        gradient = torch.sign(student, out=scratch).mul_(by_magnitude)
        return value, gradient.add_(weighted, alpha=2)

    return with_gradient(x.student, value_and_gradient) / len(x.student)


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


def _context_difference(student: Sequence[_GlobalContext], teacher: Sequence[_GlobalContext], x: _Levels) -> Tensor:
    """What the student's levels add to each channel more than the teacher's, (N, C, L)."""
    parameters = zip(*(block.parameters() for block in (*student, *teacher)))
    attention, bias, first, first_bias, scale, shift, last, last_bias = (torch.stack(p) for p in parameters)
    sides = list(zip((x.student, x.teacher), attention[:, 0].chunk(2), bias.chunk(2)))
    logits = torch.stack([torch.baddbmm(b, a.expand(len(y), -1, -1), y) for y, a, b in sides])
    contexts = torch.stack([y @ p.mT for (y, _, _), p in zip(sides, x.softmax(logits))])
    # The products give their weights' gradients in the weights' memory format, so that none is copied.
    hidden = torch.baddbmm(first_bias[..., None], first, contexts.permute(0, 3, 2, 1).flatten(0, 1)).mT
    hidden = torch.addcmul(shift[:, None], F.layer_norm(hidden, hidden.shape[2:]), scale[:, None]).relu()
    student, teacher = torch.baddbmm(last_bias[..., None], last, hidden.mT).chunk(2)
    return (student - teacher).permute(2, 1, 0)


@DISTILLATION_LOSS_REGISTRY.register()
class FGDLoss(ConnectedLoss):
    """
    :func:`fgd_loss` on the ground truth and the global relation (section 3.2), summed over the pairs of taps; behind a
    connector where the channels differ. Both networks' global context blocks are trained, as published.
    """

    name = "fgd"
    needs_labels = True

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
        options = ("TEMPERATURE", "ALPHA", "BETA", "GAMMA", "RELATION")
        return {**super().from_config(cfg, student, teacher), **{key.lower(): cfg.KD.FGD[key] for key in options}}

    def forward(self, student, teacher, context):
        boxes = [instances.gt_boxes.tensor for instances in context.ground_truth()]
        pairs = self.connected_pairs(student, teacher, context)
        levels = [match_maps("FGDLoss", *pair, same_channels=True) for pair in pairs]
        if levels[0].empty:
            return sum(zero_loss(maps.student) for maps in levels)
        with torch.autocast(levels[0].student.device.type, enabled=False):
            total = 0.0
            levels = zip(levels, self.student_contexts, self.teacher_contexts)
            # Those of an FPN have as many channels, and make one group.
            for _, group in itertools.groupby(levels, lambda level: level[0].student.shape[1]):
                maps, *contexts = zip(*group)
                x = _join(maps, boxes, context.canvas)
                shifted = torch.baddbmm(x.student, _context_difference(*contexts, x), x.inside)
                relation = F.mse_loss(shifted, x.teacher, reduction="sum") / len(x.student)
                total = total + _focal(x, **self.options) + self.relation * relation
            return total
