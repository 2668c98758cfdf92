"""Any timm model with feature maps as a Detectron2 backbone, plain or under a feature pyramid."""

from typing import Dict, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from kd_det.errors import unknown_name

__all__ = ["TimmBackbone", "build_timm_backbone", "build_timm_fpn_backbone"]

_LEVELS = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
_NORMS = ("BN", "SyncBN", "FrozenBN")


class TimmBackbone(Backbone):
    """The feature maps of a timm model at strides 4 to 32, named ``res2`` to ``res5``. Input: (N, C, H, W)."""

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = tuple(_LEVELS.values()),
        norm: str = "BN",
        freeze_at: int = 0,
        in_channels: int = 3,
    ):
        """
        Args:
            name: a model of timm, e.g. "mobilenetv2_100"; its weights are random, a checkpoint brings them.
            out_features: the levels to return.
            norm: "BN", "SyncBN" or "FrozenBN", for all the model's batch norms.
            freeze_at: as Detectron2's; 0: nothing, 1: what comes before the first stride of 4, 2: up to ``res2``, ...
            in_channels: C.

        Raises:
            ValueError: no such model, one without feature maps of these strides, or an unknown level or norm.
        """
        super().__init__()
        self.network = _feature_network(name, in_channels)
        info = self.network.feature_info
        known = {
            _LEVELS[stride]: (channels, module)
            for stride, channels, module in zip(info.reduction(), info.channels(), info.module_name())
            if stride in _LEVELS
        }
        for level in out_features:
            if level not in known:
                raise ValueError(f"timm's {name}: {unknown_name('level', level, known)}")
        if norm not in _NORMS:
            raise ValueError(unknown_name("MODEL.TIMM.NORM", norm, _NORMS))
        self._out_features = [level for level in known if level in out_features]
        self._out_feature_channels = {level: channels for level, (channels, _) in known.items()}
        self._out_feature_strides = {level: stride for stride, level in _LEVELS.items() if level in known}
        self._index = {_LEVELS.get(stride): i for i, stride in enumerate(info.reduction())}
        self.network = _with_norm(self.network, norm)
        if freeze_at:
            modules = {level: module for level, (_, module) in known.items()}
            _freeze(self.network, modules, freeze_at)

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        maps = self.network(x)
        return {level: maps[self._index[level]] for level in self._out_features}


def _feature_network(name: str, in_channels: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ValueError("timm is not installed; install it with: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(unknown_name("MODEL.TIMM.NAME", name, timm.list_models()))
    try:
        return timm.create_model(name, pretrained=False, features_only=True, in_chans=in_channels)
    except (RuntimeError, AttributeError, TypeError) as e:
        raise ValueError(f"timm's {name} gives no feature maps ({type(e).__name__}: {e}).") from None


def _freeze(network: nn.Module, levels: Dict[str, str], freeze_at: int) -> None:
    """Modules are registered in the order in which they run: those up to the end of a level, or before ``res2``."""
    from timm.layers import freeze_batch_norm_2d

    level = f"res{max(freeze_at, 2)}"
    if level not in levels:
        raise ValueError(f"MODEL.BACKBONE.FREEZE_AT {freeze_at}: {unknown_name('level', level, levels)}")
    modules = dict(network.named_modules())
    last = levels[level] if levels[level] in modules else levels[level].replace(".", "_")
    reached = False
    for name, module in modules.items():
        if name == last or name.startswith(f"{last}."):
            reached = True
            if freeze_at == 1:
                return
        elif reached:
            return
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, freeze_batch_norm_2d(module))


def _with_norm(network: nn.Module, norm: str) -> nn.Module:
    # timm's own conversions: its batch norms hold an activation, which Detectron2's conversion would drop.
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    if norm == "SyncBN":
        return convert_sync_batchnorm(network)
    return freeze_batch_norm_2d(network) if norm == "FrozenBN" else network


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """``MODEL.TIMM.*`` and ``MODEL.BACKBONE.FREEZE_AT``."""
    node = cfg.MODEL.TIMM
    return TimmBackbone(
        node.NAME,
        out_features=node.OUT_FEATURES,
        norm=node.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_channels=input_shape.channels,
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A feature pyramid on :func:`build_timm_backbone`, as Detectron2's ``build_resnet_fpn_backbone``."""
    return FPN(
        bottom_up=build_timm_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
