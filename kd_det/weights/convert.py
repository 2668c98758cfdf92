"""
Classification weights as Detectron2's backbones want them.

torchvision and timm name a ResNet's weights ``layer1.0.conv1``, ``bn1``, ``fc``; Detectron2 ``res2.0.conv1``,
``conv1.norm``. A backbone file is Detectron2's own format: ``{"model": {name: array}, "__author__",
"matching_heuristics": True}``, as its ``tools/convert-torchvision-to-d2.py`` writes it. Names are the bottom-up
network's own (``res2.0.conv1.weight``) and are matched by their ending, so one file serves ``backbone.bottom_up.`` of
a feature pyramid, ``backbone.`` and ``roi_heads.res5`` of a C4 detector, and a classifier; exact names would serve one
of them. Batch-norm statistics are there, so the file fits plain and frozen batch norms. The head is not.

Two things no name shows: the ``metadata`` says which images the weights want (channel order, mean, std in 0..255; both
libraries: RGB, while Detectron2's default is BGR with a std of 1), and where the stride is
(``MODEL.RESNETS.STRIDE_IN_1X1: False`` for both; Detectron2's default is True).
"""

import os
import pickle
import re
from typing import Dict, Iterable, List, Mapping, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

__all__ = [
    "IMAGENET_METADATA",
    "backbone_metadata",
    "backbone_weights",
    "check_normalisation",
    "classifier_names",
    "convert_resnet",
    "read_weights",
    "resnet_options",
    "save_backbone",
]

# What torchvision and, with few exceptions, timm feed their ImageNet models.
IMAGENET_METADATA = {
    "input_format": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}

_STEM = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
_IN_BLOCK = {
    **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{f"bn{i}": f"conv{i}.norm" for i in (1, 2, 3)},
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
}
_BLOCK_KEY = re.compile(r"layer([1-4])\.(\d+)\.(conv[123]|bn[123]|downsample\.[01])\.(\w+)")
_STEM_KEY = re.compile(r"(conv1|bn1)\.(\w+)")
# Of a Detectron2 ResNet alone.
_RESNET_KEY = re.compile(r"(stem|res[2-5])\..+")
# torchvision's; its file in Detectron2's zoo; Caffe2's file in Detectron2's zoo.
_HEAD_KEY = re.compile(r"(?:fc|stem\.fc|fc1000|stem\.fc1000)\.(weight|bias)")

# By the last convolution of a block, and the numbers of blocks.
_DEPTHS = {
    ("conv2", 2, 2, 2, 2): 18,
    ("conv2", 3, 4, 6, 3): 34,
    ("conv3", 3, 4, 6, 3): 50,
    ("conv3", 3, 4, 23, 3): 101,
    ("conv3", 3, 8, 36, 3): 152,
}


def _detectron2_name(key: str) -> Optional[str]:
    """Detectron2's name of a torchvision ResNet's weight outside the head; None if it is none."""
    if match := _BLOCK_KEY.fullmatch(key):
        stage, block, layer, what = match.groups()
        return f"res{int(stage) + 1}.{block}.{_IN_BLOCK[layer]}.{what}"
    if match := _STEM_KEY.fullmatch(key):
        return f"{_STEM[match[1]]}.{match[2]}"
    return None


def classifier_names(keys: Iterable[str]) -> Dict[str, str]:
    """Which of these names of weights are not ImageClassifier's, and what it calls them."""
    names = {}
    for key in keys:
        if match := _HEAD_KEY.fullmatch(key):
            names[key] = f"linear.{match[1]}"
        elif name := _detectron2_name(key) or (_RESNET_KEY.fullmatch(key) and key):
            names[key] = f"backbone.{name}"
    return names


def convert_resnet(state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """
    The weights of a torchvision or timm ResNet (also ResNeXt and wide), renamed; without the head and the counters of
    batch norm, which no output depends on.

    Raises:
        ValueError: other weights, or a ResNet that Detectron2 cannot build (deep stems, squeeze-and-excitation, ...).
    """
    kept = {key: value for key, value in state.items() if not _ignored(key)}
    unknown = [key for key in kept if _detectron2_name(key) is None]
    if unknown or not kept:
        found = f"found {', '.join(unknown[:3])} among {len(kept)} weights" if unknown else "found none"
        raise ValueError(
            f"Not the weights of a ResNet that Detectron2 has: expected conv1, bn1, layer1 to layer4 and fc, {found}."
        )
    converted = {_detectron2_name(key): value for key, value in kept.items()}
    resnet_options(converted)
    return converted


def _ignored(key: str) -> bool:
    return bool(_HEAD_KEY.fullmatch(key)) or key.endswith("num_batches_tracked")


def resnet_options(weights: Mapping[str, Tensor]) -> Dict[str, object]:
    """
    The ``MODEL.RESNETS.*`` keys that build the network of converted weights, from their names and shapes.

    Raises:
        ValueError: no depth of Detectron2's has such blocks.
    """
    last = "conv3" if "res2.0.conv3.weight" in weights else "conv2"
    blocks = [len({key.split(".")[1] for key in weights if key.startswith(f"res{stage}.")}) for stage in (2, 3, 4, 5)]
    if (last, *blocks) not in _DEPTHS:
        raise ValueError(
            f"No ResNet of Detectron2 (18, 34, 50, 101, 152) has {blocks} blocks that end in {last} (expected conv2 in "
            f"the first two, conv3 in the others)."
        )
    options: Dict[str, object] = {
        "DEPTH": _DEPTHS[last, *blocks],
        "STEM_OUT_CHANNELS": weights["stem.conv1.weight"].shape[0],
        "RES2_OUT_CHANNELS": weights[f"res2.0.{last}.weight"].shape[0],
        "STRIDE_IN_1X1": False,
    }
    if last == "conv3":
        width, per_group = weights["res2.0.conv2.weight"].shape[:2]
        options |= {"NUM_GROUPS": width // per_group, "WIDTH_PER_GROUP": per_group}
    return options


def read_weights(path: str) -> Dict[str, Tensor]:
    """
    The tensors of a torchvision or timm weight file (.pth or .safetensors); nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of named weights.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The weight file {path!r} does not exist.")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # zip, pickle and safetensors fail in their own ways
        raise ValueError(f"{path!r} is not a readable weight file ({type(e).__name__}: {e}).") from None
    for nested in ("model", "state_dict"):  # of training checkpoints
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nested), Mapping):
            loaded = loaded[nested]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path!r} holds no named weights; expected a state dict, found {type(loaded).__name__}.")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def backbone_weights(model: nn.Module) -> Dict[str, Tensor]:
    """The weights of a model's bottom-up network, by its own names, without a head and the counters of batch norm."""
    backbone = getattr(model, "backbone", model)
    backbone = getattr(backbone, "bottom_up", backbone)
    head = getattr(backbone, "head_prefixes", ())
    return {
        key: value
        for key, value in backbone.state_dict().items()
        if not key.startswith(head) and not key.endswith("num_batches_tracked")
    }


def backbone_metadata(cfg: CfgNode) -> Dict[str, object]:
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
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    aside = f"{path}.part"
    with open(aside, "wb") as f:
        pickle.dump(content, f)
    os.replace(aside, path)


def check_normalisation(checkpoint: Mapping, cfg: CfgNode) -> None:
    """
    Compare what a backbone file wants with what a config feeds it.

    Args:
        checkpoint: the content of a file; without "metadata" nothing is known and nothing is checked.
        cfg: a detector's config.

    Raises:
        ValueError: another channel order, mean or std; says the config's keys to change.
    """
    wanted = checkpoint.get("metadata") or {}
    configured = backbone_metadata(cfg)
    problems: List[str] = []
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
