"""
How much each position of a map counts: regions around objects, as weights.

Shapes: N images; G boxes in the image with the most, the others filled up with zeros, which cover nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd_det.features.regions import to_device

__all__ = ["REGIONS", "pad_boxes", "position_weights"]

REGIONS = ("all", "boxes", "gaussian", "proposals", "foreground_background")


def pad_boxes(boxes: Sequence[Tensor], device: torch.device) -> Tensor:
    """Each image's boxes (G_i, 4) as (N, G, 4) float32 on a device, G at least 1, in one copy."""
    padded = pad_sequence([*(b.detach().float() for b in boxes), boxes[0].new_zeros(1, 4).float()], batch_first=True)
    padded = padded[:-1]
    return padded if padded.device == device else to_device(padded, device)


def position_weights(
    regions: str,
    boxes: Tensor,
    canvas: tuple[int, int],
    size: tuple[int, int],
    *,
    valid: Tensor | None = None,
    foreground_share: float = 0.2,
) -> Tensor:
    """
    Weights of a map's positions, float (N, 1, H, W), not normalised: only their ratios within an image count. A box
    covers the positions that any of its pixels falls on, at least one at every level. Every level takes all boxes.

    Args:
        regions: "boxes": 1 in a box, 0 elsewhere.
            "gaussian": in a box ``exp(-(dx^2 + dy^2) / 2)``, with the distance from the centre in units of half the
            box's sides, of half a position at least; of several boxes the largest value. As in the code of DeFeat
            (arXiv 2103.14475), which gives each box to one level.
            "proposals": how many boxes cover the position.
            "foreground_background": ``foreground_share`` of an image's weight evenly on the positions in boxes, the
            rest evenly on the others: DeFeat's decoupled features, each part a mean with a weight of its own. Where an
            image has positions of one kind only, they take all.
        boxes: (N, G, 4), x1, y1, x2, y2 in pixels; see :func:`pad_boxes`.
        canvas: height and width in pixels of what the map covers: of the padded batch.
        size: H and W.
        valid: bool (N, 1, H, W), the positions that hold image, among which those of the background are counted.
        foreground_share: in 0 to 1; DeFeat's weights 3 and 12 are 0.2.
    """
    # Both axes at once, (2, N, G, max(H, W)): what a box gives to the positions along one.
    edges = torch.stack([boxes[..., axis::2] * (size[1 - axis] / canvas[1 - axis]) for axis in (1, 0)])
    first, last = edges[..., None].unbind(-2)
    position = torch.arange(max(size), device=boxes.device)
    profiles = ((position < last) & (position > first - 1)).to(boxes.dtype)
    if regions == "gaussian":
        distance = (2 * position + 1 - (first + last)) / (last - first).clamp(min=1)
        profiles = profiles * torch.exp(-0.5 * distance.square())
    rows, columns = profiles[0, ..., : size[0]], profiles[1, ..., : size[1]]
    if regions == "proposals":
        with torch.autocast(boxes.device.type, enabled=False):  # bfloat16 has no odd counts above 256
            return (rows.mT @ columns)[:, None]
    inside = (rows[..., None] * columns[..., None, :]).amax(1, keepdim=True)
    if regions != "foreground_background":
        return inside
    parts = torch.cat([inside, 1 - inside], 1)
    if valid is not None:
        parts = parts.masked_fill(~valid, 0)
    foreground, background = (parts / parts.sum((2, 3), keepdim=True).clamp(min=1)).split(1, 1)
    return foreground_share * foreground + (1 - foreground_share) * background
