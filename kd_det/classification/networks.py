"""
Classifiers of torchvision and timm by name, as configs: ``torchvision://resnet50``, ``timm://efficientnet_b0``.

A ResNet becomes an :class:`ImageClassifier` on Detectron2's own ResNet, which computes the same and has all its taps
(``res4.pre_activation``); any other network is taken whole, as a :class:`NetworkClassifier`.
"""

from typing import Dict, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from torch import Tensor, nn

from kd_det.classification.classifier import ImageClassifier
from kd_det.teachers.networks import NETWORK_SOURCES, expected_images, import_timm
from kd_det.weights.convert import timm_heads

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
    Turn a config into that of a named classifier, in place: its architecture, normalisation and input size, which are
    those of the weights that the name chooses behind a dot ("resnet50.a1_in1k"), by default of the library's choice.

    Raises:
        ValueError: an unknown network, or timm is not installed.
    """
    library, _, network = name.partition("://")
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.CLASSIFICATION.INPUT_SIZE = expected_images(library, network)
    cfg.INPUT.FORMAT = "RGB"
    architecture = network.partition(".")[0]
    if architecture not in _RESNETS:
        cfg.MODEL.META_ARCHITECTURE = "NetworkClassifier"
        cfg.CLASSIFICATION.NETWORK = name
        return
    cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP = _RESNETS[architecture]
    resnets.RES2_OUT_CHANNELS = 64 if resnets.DEPTH < 50 else 256
    resnets.OUT_FEATURES = list(_LEVEL_OF_STRIDE.values())
    resnets.NORM = "BN"
    resnets.STRIDE_IN_1X1 = False


@META_ARCH_REGISTRY.register()
class NetworkClassifier(ImageClassifier):
    """
    A whole classifier of another library, ``CLASSIFICATION.NETWORK``. Its logits are at the tap ``linear``, its maps at
    ``res2`` to ``res5`` where timm declares the modules that give strides 4 to 32, and any module of it is a tap by its
    dotted name.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict:
        return {**super().from_config(cfg), "in_feature": "logits"}

    @staticmethod
    def _build_backbone(cfg: CfgNode) -> Backbone:
        node = cfg.CLASSIFICATION
        library, _, name = node.NETWORK.partition("://")
        if library not in NETWORK_SOURCES:
            raise ValueError(
                f"CLASSIFICATION.NETWORK must be torchvision://NAME or timm://NAME, found {node.NETWORK!r}."
            )
        if library == "timm":
            network = import_timm().create_model(name, pretrained=False, num_classes=node.NUM_CLASSES)
            return _Network(network, _timm_levels(network), timm_heads(network))
        from torchvision import models

        network = models.get_model(name.partition(".")[0], weights=None, num_classes=node.NUM_CLASSES)
        return _Network(network, {}, _TORCHVISION_HEADS)

    def _pooled_channels(self) -> int:
        return 0  # the logits are not pooled

    def _build_linear(self) -> nn.Module:
        logits = nn.Identity()  # a place for the tap behind a head that is inside the network
        logits.out_features = self.num_classes
        return logits

    @staticmethod
    def _pool(features, images) -> Tensor:
        return features  # the logits

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Takes the network's own names too."""
        own = "backbone.network."
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(prefix + own)]:
            state_dict[prefix + own + key.removeprefix(prefix)] = state_dict.pop(key)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


class _Network(Backbone):
    def __init__(self, network: nn.Module, levels: Dict[str, Tuple[str, int]], heads: Sequence[str]):
        super().__init__()
        self.network = network
        self.head_prefixes = tuple(f"network.{head}." for head in heads)
        # As Detectron2's ResNet declares its stages. Registered once, inside the network; here only by name.
        self._out_feature_channels = {level: channels for level, (_, channels) in levels.items()}
        self._out_feature_strides = {level: stride for stride, level in _LEVEL_OF_STRIDE.items() if level in levels}
        self._out_features = []
        for level, (module, _) in levels.items():
            object.__setattr__(self, level, network.get_submodule(module))

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        return {"logits": self.network(x)}


def _timm_levels(network: nn.Module) -> Dict[str, Tuple[str, int]]:
    """Name and channels of the deepest module of each stride, as timm declares them."""
    modules = dict(network.named_modules())
    return {
        _LEVEL_OF_STRIDE[info["reduction"]]: (info["module"], info["num_chs"])
        for info in getattr(network, "feature_info", None) or []
        if info["reduction"] in _LEVEL_OF_STRIDE and info["module"] in modules
    }
