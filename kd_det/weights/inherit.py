"""A student that starts from its teacher's weights where shapes agree."""

import contextlib
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_det.errors import unknown_name

__all__ = ["Inherited", "inherit_weights", "shared_parts"]

logger = logging.getLogger(__name__)

# The part that a feature pyramid adds to the network below it. Other parts are modules by their dotted names.
PYRAMID = "fpn"
_BELOW = "backbone.bottom_up."


class Inherited(NamedTuple):
    taken: tuple[str, ...]  # names of the student's weights that are now the teacher's
    left: dict[str, str]  # names of those that are not, with the reason


@torch.no_grad()
def inherit_weights(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> Inherited:
    """
    Copy layers of a trained network into parts of another: a layer whole, with its bias, norm and statistics, where
    all its names and shapes agree; else not at all, because a trained bias or norm does not fit a random weight.

    Args:
        student: is changed in place.
        teacher: of the same meta-architecture, or one with modules of the same names.
        parts: "fpn" (the backbone without what it is built on) or dotted module names that both have, e.g.
            "proposal_generator", "roi_heads", "roi_heads.box_head", "head".

    Raises:
        ValueError: a part that one of the networks lacks; names the parts it has.
    """
    taken, left = [], {}
    for part in parts:
        own, theirs = _weights(student, part, "student"), _weights(teacher, part, "teacher")
        misfits = _misfits(own, theirs)
        part_taken = _whole_layers(misfits)
        for name in part_taken:
            own[name].copy_(theirs[name])
        taken += part_taken
        left |= {name: misfits[name] or "another weight of its layer differs" for name in own if name not in part_taken}
        log = logger.info if part_taken else logger.warning
        log(f"KD.INHERIT {part!r}: {len(part_taken)} of {len(own)} weights taken from the teacher.")
    for name, reason in left.items():
        logger.info(f"Not inherited: {name} ({reason})")
    return Inherited(tuple(taken), left)


def shared_parts(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> tuple[str, ...]:
    """Those of the parts that both networks have and of which :func:`inherit_weights` would take at least a layer."""
    ret = []
    for part in parts:
        with contextlib.suppress(ValueError):  # one has no such part
            if _whole_layers(_misfits(_weights(student, part, "student"), _weights(teacher, part, "teacher"))):
                ret.append(part)
    return tuple(ret)


def _misfits(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, str]:
    """Why each weight cannot be taken by itself; empty if it can."""
    return {name: _misfit(value, theirs.get(name)) for name, value in own.items()}


def _whole_layers(misfits: dict[str, str]) -> list[str]:
    """The names of the weights of layers that can be taken whole."""
    random_layers = {_layer(name) for name, misfit in misfits.items() if misfit}
    return [name for name in misfits if _layer(name) not in random_layers]


def _misfit(own: Tensor, theirs: Tensor | None) -> str:
    """Why a weight cannot be taken; empty if it can."""
    if theirs is None:
        return "the teacher has none"
    shapes = f"{tuple(own.shape)} in the student, {tuple(theirs.shape)} in the teacher"
    return "" if own.shape == theirs.shape else shapes


def _layer(name: str) -> str:
    """The layer of a weight; Detectron2's convolutions hold the norm behind them as ``norm``."""
    return name.rpartition(".")[0].removesuffix(".norm")


def _weights(model: nn.Module, part: str, side: str) -> dict[str, Tensor]:
    every = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    has_pyramid = any(name.startswith(_BELOW) for name in every)
    if part == PYRAMID:
        state = {
            n: v for n, v in every.items() if has_pyramid and n.startswith("backbone.") and not n.startswith(_BELOW)
        }
    else:
        state = {name: value for name, value in every.items() if name.startswith(f"{part}.")}
    if not state:
        parts = [name for name, module in model.named_children() if module.state_dict()] + [PYRAMID] * has_pyramid
        raise ValueError(unknown_name(f"part of the {side} in KD.INHERIT", part, parts) + " Dotted names work too.")
    return state
