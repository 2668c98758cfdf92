"""
Backbone files: Detectron2's own format for weights that a detector starts from, ``{"model": {name: array},
"__author__", "matching_heuristics": True}``, as its ``tools/convert-torchvision-to-d2.py`` writes it.

Names are the bottom-up network's own (``res2.0.conv1.weight``) and are matched by their ending, so one file serves a
feature pyramid, a C4 detector and a classifier. Batch-norm statistics are there, the head is not. The ``metadata``
holds what no name shows: channel order, mean and std (0..255) of the images that the weights were trained on.
"""

import os
import pickle
from collections.abc import Mapping

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from kd_det.weights.files import write_aside

__all__ = ["IMAGENET_METADATA", "backbone_metadata", "backbone_weights", "check_normalisation", "save_backbone"]

# What torchvision and, with few exceptions, timm feed their ImageNet models.
IMAGENET_METADATA = {
    "input_format": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}
_KEYS = {"input_format": "INPUT.FORMAT", "pixel_mean": "MODEL.PIXEL_MEAN", "pixel_std": "MODEL.PIXEL_STD"}


def backbone_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model's bottom-up network, by its own names, without a head and the counters of batch norm."""
    backbone = getattr(model, "backbone", model)
    backbone = getattr(backbone, "bottom_up", backbone)
    head = getattr(backbone, "head_prefixes", ())
    return {
        key: value
        for key, value in backbone.state_dict().items()
        if not key.startswith(head) and not key.endswith("num_batches_tracked")
    }


def backbone_metadata(cfg: CfgNode) -> dict[str, object]:
    """What a detector must know of the images that a config's backbone was trained on."""
    means = {key: [float(x) for x in cfg.MODEL[key.upper()]] for key in ("pixel_mean", "pixel_std")}
    return {"input_format": cfg.INPUT.FORMAT, **means}


def save_backbone(path: str, weights: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """
    Write a backbone file: all of it, or nothing. For its content see :func:`backbone_weights`, :func:`convert_resnet`
    and :func:`backbone_metadata`.

    Raises:
        ValueError: the path does not end with ".pkl".
    """
    if not path.endswith(".pkl"):
        raise ValueError(f"A backbone file ends with .pkl, by which Detectron2 knows its format; found {path!r}.")
    content = {
        "model": {key: np.ascontiguousarray(value.detach().cpu().numpy()) for key, value in weights.items()},
        "__author__": "kd_det",
        "matching_heuristics": True,
        "metadata": dict(metadata),
    }
    PathManager.mkdirs(os.path.dirname(path) or ".")
    write_aside(path, lambda file: pickle.dump(content, file))


def check_normalisation(checkpoint: Mapping, cfg: CfgNode) -> None:
    """
    Compare the images that a backbone file was trained on with those that a detector's config feeds it. Of a file
    without "metadata" nothing is known and nothing is checked.

    Raises:
        ValueError: another channel order, mean or std; names the config's keys to change.
    """
    wanted, configured = checkpoint.get("metadata") or {}, backbone_metadata(cfg)
    problems = [
        f"{key} must be {wanted[name]}, found {configured[name]}"
        for name, key in _KEYS.items()
        if name in wanted and not _same(wanted[name], configured[name])
    ]
    if problems:
        raise ValueError(f"The backbone was trained on other images than the config feeds it: {'; '.join(problems)}.")


def _same(a, b) -> bool:
    return a == b if isinstance(a, str) else len(a) == len(b) and np.allclose(a, b, rtol=0, atol=1e-2)
