"""
Backbone files: Detectron2's own format for weights that a detector starts from, ``{"model": {name: array},
"__author__", "matching_heuristics": True}``, as its ``tools/convert-torchvision-to-d2.py`` writes it.

Names are the bottom-up network's own (``res2.0.conv1.weight``) and are matched by their ending, so one file serves
``backbone.bottom_up.`` of a feature pyramid, ``backbone.`` and ``roi_heads.res5`` of a C4 detector, and a classifier;
exact names would serve one of them. Batch-norm statistics are there, so the file fits plain and frozen batch norms. The
head is not. The ``metadata`` holds what no name shows: which images the weights want (channel order, mean, std in
0..255; torchvision's and timm's ResNets: RGB, while Detectron2's default is BGR with a std of 1).
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
    return {
        "input_format": cfg.INPUT.FORMAT,
        "pixel_mean": [float(x) for x in cfg.MODEL.PIXEL_MEAN],
        "pixel_std": [float(x) for x in cfg.MODEL.PIXEL_STD],
    }


def save_backbone(path: str, weights: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """
    Write a backbone file: all of it, or nothing.

    Args:
        path: ends with ".pkl", by which Detectron2 knows the format.
        weights: see :func:`backbone_weights` and :func:`convert_resnet`.
        metadata: see :func:`backbone_metadata`.

    Raises:
        ValueError: another ending.
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
    Compare the images that a backbone file was trained on with those that a config feeds it.

    Args:
        checkpoint: the content of a file; without "metadata" nothing is known and nothing is checked.
        cfg: a detector's config.

    Raises:
        ValueError: another channel order, mean or std; names the config's keys to change.
    """
    wanted = checkpoint.get("metadata") or {}
    configured = backbone_metadata(cfg)
    problems = []
    for name, key in (
        ("input_format", "INPUT.FORMAT"),
        ("pixel_mean", "MODEL.PIXEL_MEAN"),
        ("pixel_std", "MODEL.PIXEL_STD"),
    ):
        if name in wanted and not _same(wanted[name], configured[name]):
            problems.append(f"{key} must be {wanted[name]}, found {configured[name]}")
    if problems:
        raise ValueError(f"The backbone was trained on other images than the config feeds it: {'; '.join(problems)}.")


def _same(a, b) -> bool:
    return a == b if isinstance(a, str) else len(a) == len(b) and np.allclose(a, b, rtol=0, atol=1e-2)
