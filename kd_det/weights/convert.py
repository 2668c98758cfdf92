"""
Weights of torchvision and timm by the names of Detectron2's backbones.

torchvision and timm name a ResNet's weights ``layer1.0.conv1``, ``bn1``, ``fc``; Detectron2 ``res2.0.conv1``,
``conv1.norm``. The names do not show where the stride is: ``MODEL.RESNETS.STRIDE_IN_1X1`` is False for both libraries,
and True by Detectron2's default.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from kd_det.backbones.timm_backbone import flat_key, timm_feature_network
from kd_det.weights.strict import misshapen

__all__ = ["classifier_names", "convert_for_timm", "convert_resnet", "resnet_options", "timm_heads"]

_BLOCK_KEY = re.compile(r"layer([1-4])\.(\d+)\.(conv[123]|bn[123]|downsample\.[01])\.(\w+)")
_STEM_KEY = re.compile(r"(conv1|bn1)\.(\w+)")
# Names that only a ResNet of Detectron2 has.
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


def _detectron2_name(key: str) -> str | None:
    """Detectron2's name of a torchvision ResNet's weight outside the head; None if it has none."""
    if match := _BLOCK_KEY.fullmatch(key):
        stage, block, layer, what = match.groups()
        prefix = f"res{int(stage) + 1}.{block}"
    elif match := _STEM_KEY.fullmatch(key):
        layer, what = match.groups()
        prefix = "stem"
    else:
        return None
    layer = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}.get(layer, layer)
    layer = re.sub(r"bn(.)", r"conv\1.norm", layer)
    return f"{prefix}.{layer}.{what}"


def classifier_names(keys: Iterable[str]) -> dict[str, str]:
    """Which of these names of weights are not ImageClassifier's, and what it calls them."""
    names = {}
    for key in keys:
        if match := _HEAD_KEY.fullmatch(key):
            names[key] = f"linear.{match[1]}"
        elif name := _detectron2_name(key) or (_RESNET_KEY.fullmatch(key) and key):
            names[key] = f"backbone.{name}"
    return names


def convert_resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    The weights of a torchvision or timm ResNet (also ResNeXt and wide), renamed; without the head and the counters of
    batch norm, which no output depends on.

    Raises:
        ValueError: other weights, or a ResNet that Detectron2 cannot build (deep stems, squeeze-and-excitation, ...).
    """
    kept = _without_head(state)
    unknown = [key for key in kept if _detectron2_name(key) is None]
    if unknown or not kept:
        found = f"found {', '.join(unknown[:3])} among {len(kept)} weights" if unknown else "found none"
        raise ValueError(
            f"Not the weights of a ResNet that Detectron2 has: expected conv1, bn1, layer1 to layer4 and fc, {found}."
        )
    converted = {_detectron2_name(key): value for key, value in kept.items()}
    resnet_options(converted)
    return converted


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not _HEAD_KEY.fullmatch(k) and not k.endswith("num_batches_tracked")}


def resnet_options(weights: Mapping[str, Tensor]) -> dict[str, object]:
    """The ``MODEL.RESNETS.*`` keys of the network of converted weights; a ``ValueError`` if Detectron2 has none."""
    last = "conv3" if "res2.0.conv3.weight" in weights else "conv2"
    blocks = [len({key.split(".")[1] for key in weights if key.startswith(f"res{stage}.")}) for stage in (2, 3, 4, 5)]
    if (last, *blocks) not in _DEPTHS:
        raise ValueError(
            f"No ResNet of Detectron2 (18, 34, 50, 101, 152) has {blocks} blocks that end in {last} (expected conv2 in "
            f"the first two, conv3 in the others)."
        )
    options: dict[str, object] = {
        "DEPTH": _DEPTHS[last, *blocks],
        "STEM_OUT_CHANNELS": weights["stem.conv1.weight"].shape[0],
        "RES2_OUT_CHANNELS": weights[f"res2.0.{last}.weight"].shape[0],
        "STRIDE_IN_1X1": False,
    }
    if last == "conv3":
        width, per_group = weights["res2.0.conv2.weight"].shape[:2]
        options |= {"NUM_GROUPS": width // per_group, "WIDTH_PER_GROUP": per_group}
    return options


def convert_for_timm(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """
    Another library's weights of the network that timm calls ``name``, by the names of a ``TimmBackbone``; without the
    classifier and the counters of batch norm. Where the names are not timm's, weights are paired in order, as both
    libraries register modules in the order in which they run; ``state`` may lack the classifier.

    Raises:
        ValueError: no model of timm that gives feature maps, or weights that are not those of this model: other
            numbers, kinds or shapes; names the first that differs.
    """
    features, state = _without_head(timm_feature_network(name, {}).state_dict()), _without_head(state)
    given = {flat_key(key): value for key, value in state.items()}
    if not all(flat_key(key) in given for key in features):
        given = _in_order_of(name, state)
    return {f"network.{key}": given[flat_key(key)] for key in features}


def _in_order_of(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import timm

    network = timm.create_model(name)
    own = _without_head(network.state_dict())
    body = [key for key in own if key.partition(".")[0] not in timm_heads(network)]
    if not len(body) <= len(state) <= len(own):
        raise ValueError(f"Not the weights of timm's {name!r}, which has {len(own)}: found {len(state)}.")
    for (theirs, value), mine in zip(state.items(), body):
        if value.shape != own[mine].shape or theirs.rpartition(".")[2] != mine.rpartition(".")[2]:
            difference = misshapen(theirs, value.shape, own[mine].shape)
            raise ValueError(f"Not the weights of timm's {name!r} in its order: {difference} as {mine}.")
    return {flat_key(mine): value for mine, value in zip(body, state.values())}


def timm_heads(network: nn.Module) -> list[str]:
    """The modules of a timm network that hold its classifier, as timm declares them."""
    names = network.pretrained_cfg.get("classifier") or ()
    return [name.partition(".")[0] for name in ([names] if isinstance(names, str) else names)]
