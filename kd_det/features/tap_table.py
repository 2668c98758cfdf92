"""What can be tapped in a network: names, channels, strides, sizes, and which places are frozen."""

import copy
import math
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from kd_det.features.taps import PRE_ACTIVATION, Taps, tap_module, tap_names

__all__ = ["TapInfo", "format_taps", "input_size", "list_taps"]


@dataclass(frozen=True)
class TapInfo:
    name: str  # as a config names it
    channels: int
    stride: int  # the input's height over the map's, to the nearest power of 2
    size: tuple[int, int]  # height and width of the map
    frozen: bool  # no trained parameter lies before it, so that a loss there cannot teach


def list_taps(model: nn.Module, size: tuple[int, int]) -> list[TapInfo]:
    """
    Every level, stage and residual block of a detector's backbone, and every pre-activation.

    Args:
        model: a detector; it neither runs nor changes: a copy without storage runs instead.
        size: height and width of an image, before padding.

    Raises:
        ValueError: a backbone that runs on real devices only, such as one with deformable convolutions.
    """
    model = copy.deepcopy(model).to("meta").eval()
    names = _with_blocks(model)
    multiple = max(model.backbone.size_divisibility, 1)
    canvas = [-(-side // multiple) * multiple for side in size]
    taps = Taps(model, names)
    try:
        with taps.recording():
            model.backbone(torch.zeros(1, 3, *canvas, device="meta"))
    except (NotImplementedError, RuntimeError) as e:
        raise ValueError(f"This backbone cannot be run without a device, so its taps are not listed: {e}") from e
    values = taps.pop()
    infos = []
    for name in names:
        _, channels, height, width = values[name][0].shape
        stride = 2 ** round(math.log2(canvas[0] / height))
        infos.append(TapInfo(name, channels, stride, (height, width), not values[name][0].requires_grad))
    return infos


def _with_blocks(model: nn.Module) -> list[str]:
    """The levels' names with those of each stage's blocks behind them."""
    levels = tap_names(model)
    modules = dict(model.named_modules())
    dotted = {module: name for name, module in modules.items()}
    names = []
    for name in levels:
        names.append(name)
        if f"{name}.{PRE_ACTIVATION}" in levels:
            stage = dotted[tap_module(model, f"{name}.{PRE_ACTIVATION}")].rpartition(".")[0]
            prefix = name if tap_module(model, name) is modules[stage] else stage  # a timm network's level is no module
            blocks = [f"{prefix}.{block}" for block, _ in modules[stage].named_children()]
            names += [f"{block}{suffix}" for block in blocks for suffix in ("", f".{PRE_ACTIVATION}")]
    return names


def input_size(cfg: CfgNode) -> tuple[int, int]:
    """Height and width of a test image: the short side MIN_SIZE_TEST, the long one at most MAX_SIZE_TEST."""
    short = cfg.INPUT.MIN_SIZE_TEST or 800
    return short, max(min(cfg.INPUT.MAX_SIZE_TEST, round(short * 1333 / 800)), short)


def format_taps(taps: list[TapInfo]) -> str:
    rows = [(t.name, t.channels, t.stride, "{}x{}".format(*t.size), "yes" if t.frozen else "") for t in taps]
    return tabulate(rows, headers=("tap", "channels", "stride", "size", "frozen"), tablefmt="simple")
