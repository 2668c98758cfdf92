"""A student that starts from its teacher's weights where shapes agree."""

import logging
from collections.abc import Sequence
from typing import Dict, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from kd_det.errors import unknown_name

__all__ = ["Inherited", "inherit_weights"]

logger = logging.getLogger(__name__)

# What a feature pyramid adds to the network below it. Other parts are modules by their dotted names.
PYRAMID = "fpn"


class Inherited(NamedTuple):
    """
    Attributes:
        taken: names of the student's weights that are now the teacher's.
        left: names of those that are not, with the reason.
    """

    taken: Tuple[str, ...]
    left: Dict[str, str]


@torch.no_grad()
def inherit_weights(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> Inherited:
    """
    Copy a trained network's weights and statistics into parts of another, wherever name and shape agree.

    Args:
        student: is changed in place.
        teacher: of the same meta-architecture, or one with modules of the same names.
        parts: "fpn" (the backbone without what it is built on) or dotted module names that both have, e.g.
            "proposal_generator", "roi_heads", "roi_heads.box_head", "head".

    Raises:
        ValueError: a part that one of the networks lacks; says the parts it has.
    """
    taken, left = [], {}
    for part in parts:
        own, theirs = _weights(student, part, "student"), _weights(teacher, part, "teacher")
        part_taken = 0
        for name, value in own.items():
            if name not in theirs:
                left[name] = "the teacher has none"
            elif theirs[name].shape != value.shape:
                left[name] = f"{tuple(value.shape)} in the student, {tuple(theirs[name].shape)} in the teacher"
            else:
                value.copy_(theirs[name])
                taken.append(name)
                part_taken += 1
        log = logger.info if part_taken else logger.warning
        log(f"KD.INHERIT {part!r}: {part_taken} of {len(own)} weights taken from the teacher.")
    for name, reason in left.items():
        logger.info(f"Not inherited: {name} ({reason})")
    return Inherited(tuple(taken), left)


def _weights(model: nn.Module, part: str, side: str) -> Dict[str, Tensor]:
    prefix = "backbone" if part == PYRAMID else part
    below = "backbone.bottom_up."
    state = {name: value for name, value in model.state_dict().items() if name.startswith(f"{prefix}.")}
    if part == PYRAMID:
        has_pyramid = any(name.startswith(below) for name in state)
        state = {name: value for name, value in state.items() if has_pyramid and not name.startswith(below)}
    if not state:
        parts = [name for name, module in model.named_children() if module.state_dict()]
        if any(name.startswith(below) for name in model.state_dict()):
            parts.append(PYRAMID)
        raise ValueError(unknown_name(f"part of the {side} in KD.INHERIT", part, parts) + " Dotted names work too.")
    return state
