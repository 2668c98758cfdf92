"""
What both networks predict at the same anchors: the heads of RetinaNet and FCOS, and that of an RPN.

Shapes: N images; A anchors at each of the P positions of all levels; K classes (1 in an RPN).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["DenseHead", "check_same_anchors", "dense_head", "per_anchor", "rpn_head", "valid_anchors"]


@dataclass(frozen=True)
class DenseHead:
    """One interface to heads that predict at every position of every level. An FCOS has one anchor at a position."""

    module: nn.Module
    # Modules of the network that give a map a level: logits (N, A K, H, W), deltas (N, A 4, H, W) and, in FCOS,
    # centerness (N, A, H, W).
    taps: tuple[str, ...]
    num_classes: int  # K
    anchors: list[Tensor]  # of each level, (A, 4): the boxes at its first position
    strides: list[int]  # of each level
    transform: Any  # from deltas and anchors to boxes

    @property
    def num_anchors(self) -> int:
        return len(self.anchors[0])


def dense_head(network: nn.Module, *, side: str) -> DenseHead:
    """The head of RetinaNet or FCOS; a ``ValueError`` for a network that has none, where ``side`` is the network."""
    head = getattr(network, "head", None)
    if not (hasattr(head, "cls_score") and hasattr(head, "bbox_pred") and hasattr(network, "anchor_generator")):
        raise ValueError(f"the {side} {type(network).__name__} has no dense head, which RetinaNet and FCOS have.")
    outputs = [name for name in ("cls_score", "bbox_pred", "ctrness") if hasattr(head, name)]
    return _read("head", head, outputs, network.num_classes, network, side)


def rpn_head(network: nn.Module, *, side: str) -> DenseHead:
    """The head of an RPN; a ``ValueError`` for a network that has none, where ``side`` is the network."""
    rpn = getattr(network, "proposal_generator", None)
    head = getattr(rpn, "rpn_head", None)
    outputs = ("objectness_logits", "anchor_deltas")
    if not all(hasattr(head, name) for name in outputs):
        raise ValueError(f"the {side} {type(network).__name__} has no RPN with a StandardRPNHead.")
    return _read("proposal_generator.rpn_head", head, outputs, 1, rpn, side)


def _read(
    path: str, head: nn.Module, outputs: Sequence[str], num_classes: int, owner: nn.Module, side: str
) -> DenseHead:
    generator = owner.anchor_generator
    cells, strides = getattr(generator, "cell_anchors", None), getattr(generator, "strides", None)
    if cells is None or strides is None or any(cell.shape[1] != 4 for cell in cells):
        raise ValueError(f"the {side}'s {type(generator).__name__} gives no upright anchors to compare.")
    taps = tuple(f"{path}.{name}" for name in outputs)
    offset = getattr(generator, "offset", 0.0)
    anchors = [cell.detach().cpu() + offset * stride for cell, stride in zip(cells, strides)]
    return DenseHead(head, taps, num_classes, anchors, list(strides), owner.box2box_transform)


def check_same_anchors(student: DenseHead, teacher: DenseHead) -> None:
    """Raise a ``ValueError`` unless two heads predict the same kind of numbers for the same anchors."""
    found = [
        f"{type(head.module).__name__} that predicts {', '.join(tap.rpartition('.')[2] for tap in head.taps)}, with "
        f"{_describe(head.transform)}"
        for head in (student, teacher)
    ]
    if student.taps != teacher.taps or _describe(student.transform) != _describe(teacher.transform):
        raise ValueError(f"the student's head is a {found[0]}, the teacher's a {found[1]}.")
    if len(student.strides) != len(teacher.strides):
        raise ValueError(f"the student has {len(student.strides)} levels and the teacher {len(teacher.strides)}.")
    for level, (own, theirs) in enumerate(zip(student.anchors, teacher.anchors)):
        strides = student.strides[level], teacher.strides[level]
        # Sizes in a config are rounded: 40.3175 for 32 x 2^(1/3).
        if strides[0] != strides[1] or own.shape != theirs.shape or not torch.allclose(own, theirs, rtol=1e-3):
            sides = [
                f"{', '.join('{:.4g}x{:.4g}'.format(*size) for size in (a[:, 2:] - a[:, :2]).tolist())} at stride {s}"
                for a, s in zip((own, theirs), strides)
            ]
            raise ValueError(f"the student's anchors of level {level} are {sides[0]}, the teacher's {sides[1]}.")


def _describe(transform) -> str:
    options = {name: getattr(transform, name, None) for name in ("weights", "normalize_by_size")}
    options = ", ".join(f"{k} {tuple(v) if k == 'weights' else v}" for k, v in options.items() if v is not None)
    return f"{type(transform).__name__} ({options})"


def per_anchor(levels: Sequence[Tensor], num_anchors: int) -> Tensor:
    """Maps (N, A D, H, W) of all levels as one tensor (N A, D, P)."""
    joined = torch.cat([x.flatten(2) for x in levels], dim=2)
    return joined.unflatten(1, (num_anchors, -1)).flatten(0, 1)


def valid_anchors(levels: Sequence[Tensor], num_anchors: int, context) -> Tensor | None:
    """Which anchors of :func:`per_anchor` hold image, bool (N A, 1, P); None: all."""
    masks = [context.valid(x) for x in levels]
    if all(mask is None for mask in masks):
        return None
    masks = [torch.ones_like(x[:, :1], dtype=torch.bool) if m is None else m for x, m in zip(levels, masks)]
    return per_anchor([mask.expand(-1, num_anchors, -1, -1) for mask in masks], num_anchors)
