"""
Classifiers of torchvision and timm by name, as configs: ``torchvision://resnet50``, ``timm://efficientnet_b0``.

A ResNet becomes an :class:`ImageClassifier` on Detectron2's own ResNet, which computes the same and has all its taps
(``res4.pre_activation``); any other network is taken whole, as a :class:`NetworkClassifier`.
"""

from typing import Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from torch import Tensor, nn

from kd_det.classification.classifier import ImageClassifier
from kd_det.errors import unknown_name
from kd_det.teachers.networks import NETWORK_SOURCES, import_timm

__all__ = ["NetworkClassifier", "configure_network"]

# Depth, groups and width per group of the ResNets that both libraries build as Detectron2 does.
_RESNETS = {
    "resnet18": (18, 1, 64),
    "resnet34": (34, 1, 64),
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
}

# What torchvision calls the part of its classifiers behind the features.
_TORCHVISION_HEADS = ("fc", "classifier", "head", "heads")

_LEVEL_OF_STRIDE = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}


def configure_network(cfg: CfgNode, name: str) -> None:
    """
    Turn a config into that of a named classifier, in place: its architecture, normalisation and input size.

    Args:
        cfg: with the nodes of :func:`add_classification_config`.
        name: "torchvision://NAME" or "timm://NAME"; a variant behind a dot ("resnet50.a1_in1k") chooses timm's
            normalisation and size.

    Raises:
        ValueError: an unknown library or network, or timm is not installed.
    """
    library, _, network = name.partition("://")
    if library not in NETWORK_SOURCES:
        raise ValueError(unknown_name("source of networks", library, NETWORK_SOURCES))
    mean, std, size = NETWORK_SOURCES[library](network)
    cfg.MODEL.PIXEL_MEAN = [255 * x for x in mean]
    cfg.MODEL.PIXEL_STD = [255 * x for x in std]
    cfg.INPUT.FORMAT = "RGB"
    cfg.CLASSIFICATION.INPUT_SIZE = size
    architecture = network.partition(".")[0]
    if architecture not in _RESNETS:
        cfg.MODEL.META_ARCHITECTURE = "NetworkClassifier"
        cfg.CLASSIFICATION.NETWORK = name
        return
    depth, groups, width = _RESNETS[architecture]
    cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP = depth, groups, width
    resnets.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    resnets.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    resnets.NORM = "BN"
    resnets.STRIDE_IN_1X1 = False


@META_ARCH_REGISTRY.register()
class NetworkClassifier(ImageClassifier):
    """
    A whole classifier of another library. Its logits are at the tap ``linear``, its maps at ``res2`` to ``res5`` where
    timm declares the modules that give strides 4 to 32, and any module of it is a tap by its dotted name.
    """

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        levels: Optional[Dict[str, Tuple[str, int]]] = None,
        heads: Sequence[str] = (),
        **kwargs,
    ):
        """
        Args:
            network: maps normalised images (N, 3, H, W) to logits (N, K).
            levels: module name and channels of feature levels by name, e.g. {"res5": ("layer4", 2048)}.
            heads: names of its modules that are no part of a backbone.
            kwargs: see :class:`ImageClassifier`, without ``backbone`` and ``in_feature``.
        """
        super().__init__(backbone=_Network(network, levels or {}, heads), in_feature="logits", **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict:
        node = cfg.CLASSIFICATION
        library, _, name = node.NETWORK.partition("://")
        if library not in NETWORK_SOURCES:
            raise ValueError(
                f"CLASSIFICATION.NETWORK must be torchvision://NAME or timm://NAME, found {node.NETWORK!r}."
            )
        if library == "timm":
            network = import_timm().create_model(name, pretrained=False, num_classes=node.NUM_CLASSES)
            levels, heads = _levels(network), _heads(network)
        else:
            from torchvision import models

            network = models.get_model(name, weights=None, num_classes=node.NUM_CLASSES)
            levels, heads = {}, _TORCHVISION_HEADS
        return {
            "network": network,
            "levels": levels,
            "heads": heads,
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "label_smoothing": node.LABEL_SMOOTHING,
            "input_size": node.INPUT_SIZE,
        }

    def _build_linear(self) -> nn.Module:
        return _Logits(self.num_classes)

    def logits(self, batched_inputs):
        images = self.preprocess_image(batched_inputs)
        return self.linear(self.backbone(images.tensor)["logits"])

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Takes the network's own names too."""
        own = "backbone.network."
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(prefix + own)]:
            state_dict[prefix + own + key.removeprefix(prefix)] = state_dict.pop(key)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


class _Logits(nn.Identity):
    """A place for the tap ``linear`` behind a head that is inside the network."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.out_features = num_classes


class _Network(Backbone):
    def __init__(self, network: nn.Module, levels: Dict[str, Tuple[str, int]], heads: Sequence[str]):
        super().__init__()
        self.network = network
        self.head_prefixes = tuple(f"network.{head}." for head in heads)
        # As Detectron2's ResNet declares its stages. Registered once, inside the network; here only by name.
        self._out_feature_channels = {level: channels for level, (_, channels) in levels.items()}
        self._out_feature_strides = {level: stride for stride, level in _LEVEL_OF_STRIDE.items() if level in levels}
        self._out_features: List[str] = []
        modules = dict(network.named_modules())
        for level, (module, _) in levels.items():
            object.__setattr__(self, level, modules[module])

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        return {"logits": self.network(x)}


def _heads(network: nn.Module) -> List[str]:
    """The modules that hold the classifier, as timm declares them."""
    names = network.pretrained_cfg.get("classifier") or ()
    return [name.partition(".")[0] for name in ([names] if isinstance(names, str) else names)]


def _levels(network: nn.Module) -> Dict[str, Tuple[str, int]]:
    """The deepest module of each stride, as timm declares them."""
    modules = dict(network.named_modules())
    levels = {}
    for info in getattr(network, "feature_info", []) or []:
        level = _LEVEL_OF_STRIDE.get(info["reduction"])
        if level and info["module"] in modules:
            levels[level] = (info["module"], info["num_chs"])
    return levels
