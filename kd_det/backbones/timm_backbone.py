"""
Any timm model with feature maps as a Detectron2 backbone, alone or under a feature pyramid.

This file needs Detectron2 and timm, and nothing else of kd_det: an exported student carries a copy of it.
"""

import difflib
import logging
from typing import Any, Dict, Optional, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

__all__ = [
    "TimmBackbone",
    "add_timm_config",
    "build_retinanet_timm_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]

# Detectron2's names of the levels, by stride.
_LEVELS = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
_NORMS = ("BN", "SyncBN", "FrozenBN")


def add_timm_config(cfg: CfgNode) -> None:
    """Add the node ``MODEL.TIMM`` to a Detectron2 config, in place."""
    cfg.MODEL.TIMM = CfgNode()
    # Name of a timm model that gives feature maps, e.g. "mobilenetv2_100" (timm.list_models()).
    cfg.MODEL.TIMM.NAME = ""
    # A file of timm's weights for it, "pretrained" (timm downloads its own), or "" (random, or from MODEL.WEIGHTS).
    cfg.MODEL.TIMM.WEIGHTS = ""
    # The model's batch norms as they are, "BN", or as "SyncBN" or "FrozenBN".
    cfg.MODEL.TIMM.NORM = "BN"
    # Levels to return, of res2 (stride 4) to res5 (stride 32).
    cfg.MODEL.TIMM.OUT_FEATURES = ("res2", "res3", "res4", "res5")
    # KEY VALUE pairs for timm.create_model, e.g. ["strict_img_size", False].
    cfg.MODEL.TIMM.OPTS = []


class TimmBackbone(Backbone):
    """A timm model whose maps of stride 4, 8, 16 and 32 are ``res2``, ``res3``, ``res4`` and ``res5``."""

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        weights: str = "",
        norm: str = "BN",
        freeze_at: int = 0,
        in_channels: int = 3,
        options: Optional[Dict[str, Any]] = None,
    ):
        """
        Args:
            name, out_features, weights, norm: see :func:`add_timm_config`.
            freeze_at: as Detectron2 counts: 0 nothing, 1 what comes before res2, 2 res2 as well, ..., 5 everything.
                Batch norms in frozen stages become FrozenBN.
            options: further arguments of ``timm.create_model``.

        Raises:
            ImportError: timm is not installed.
            ValueError: an unknown model, one without maps at these levels, an unknown norm, or weights that do not fit.
            FileNotFoundError: the weights' file does not exist.
        """
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(f"Unknown MODEL.TIMM.NORM {norm!r}. Valid names: {', '.join(_NORMS)}.")
        options = {**(options or {}), "in_chans": in_channels}
        network = timm_feature_network(name, options, weights=weights)
        indices = _indices_of_levels(name, network, out_features)
        if max(indices.values()) < max(network.feature_info.out_indices):
            options["out_indices"] = sorted(indices.values())
            network = timm_feature_network(name, options, weights=weights)  # no deeper than it is read
        self.network = network

        info = network.feature_info
        # The deepest of several maps with one stride (a ViT).
        self._order = {_LEVELS[stride]: i for i, stride in enumerate(info.reduction()) if stride in _LEVELS}
        self._out_features = list(out_features)
        self._out_feature_channels = {level: info.channels()[i] for level, i in self._order.items()}
        self._out_feature_strides = {level: info.reduction()[i] for level, i in self._order.items()}
        self._channels_last = getattr(network, "output_fmt", None) == "NHWC"
        self._freeze(freeze_at)
        if norm == "FrozenBN":
            self.network = _frozen_norm(self.network)
        elif norm == "SyncBN":
            from timm.layers import convert_sync_batchnorm

            self.network = convert_sync_batchnorm(self.network)

    @property
    def stage_modules(self) -> Dict[str, nn.Module]:
        """The modules whose outputs are the levels, for taps inside them."""
        names, modules = self.network.feature_info.module_name(), dict(self.network.named_modules())
        # A network of features names its modules "stages_0" or "model.stages.0" where the whole model has "stages.0".
        spellings = {
            level: (names[i], names[i].replace(".", "_", 1), f"model.{names[i]}") for level, i in self._order.items()
        }
        return {level: next(modules[n] for n in known if n in modules) for level, known in spellings.items()}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Optional[ShapeSpec] = None) -> Dict:
        node = cfg.MODEL.TIMM
        return {
            "name": node.NAME,
            "out_features": node.OUT_FEATURES,
            "weights": node.WEIGHTS,
            "norm": node.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "in_channels": input_shape.channels if input_shape else 3,
            "options": timm_options(cfg),
        }

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """(N, 3, H, W) to a dict of levels, each (N, C, H / stride, W / stride)."""
        maps = self.network(x)
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return {level: maps[self._order[level]] for level in self._out_features}

    def _freeze(self, freeze_at: int) -> None:
        if not 0 <= freeze_at <= 5:
            raise ValueError(f"MODEL.BACKBONE.FREEZE_AT must be 0 to 5, found {freeze_at}.")
        if freeze_at == 0:
            return
        # timm's own feature networks rely on it as well: modules are registered in the order in which they run.
        modules, stages = dict(self.network.named_modules()), self.stage_modules
        order = {module: i for i, module in enumerate(modules.values())}
        frozen = [order[m] for level in stages if int(level[-1]) <= freeze_at for m in stages[level].modules()]
        end = max(frozen) + 1 if frozen else min(order[stage] for stage in stages.values())
        for name, module in list(modules.items())[:end]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                parent, _, child = name.rpartition(".")
                setattr(modules[parent], child, _frozen_norm(module))


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """``MODEL.TIMM`` alone, with the outputs ``MODEL.TIMM.OUT_FEATURES``."""
    backbone = TimmBackbone(cfg, input_shape)
    _warn_of_other_images(cfg)
    return backbone


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``MODEL.TIMM`` under Detectron2's feature pyramid, p2 to p6."""
    return _pyramid(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``MODEL.TIMM`` under the feature pyramid of RetinaNet and FCOS, p3 to p7."""
    bottom_up = build_timm_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels
    return _pyramid(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _pyramid(cfg: CfgNode, bottom_up: TimmBackbone, top_block: nn.Module) -> FPN:
    node, wanted, given = cfg.MODEL.FPN, list(cfg.MODEL.FPN.IN_FEATURES), list(bottom_up.output_shape())
    if not wanted or not set(wanted) <= set(given):
        raise ValueError(f"MODEL.FPN.IN_FEATURES {wanted} must be among MODEL.TIMM.OUT_FEATURES {given}.")
    return FPN(bottom_up, wanted, node.OUT_CHANNELS, norm=node.NORM, top_block=top_block, fuse_type=node.FUSE_TYPE)


def _warn_of_other_images(cfg: CfgNode) -> None:
    """No error: a file does not tell its normalisation, which may be another one than timm's."""
    if not cfg.MODEL.TIMM.WEIGHTS:
        return
    import timm

    trained = timm.get_pretrained_cfg(cfg.MODEL.TIMM.NAME)
    wanted = {"PIXEL_MEAN": trained.mean, "PIXEL_STD": trained.std}
    wanted = {f"MODEL.{key}": [round(255 * x, 3) for x in values] for key, values in wanted.items()}
    found = {f"MODEL.{key}": [float(x) for x in cfg.MODEL[key]] for key in ("PIXEL_MEAN", "PIXEL_STD")}
    if cfg.INPUT.FORMAT != "RGB" or any(abs(a - b) > 0.01 for key in found for a, b in zip(found[key], wanted[key])):
        logging.getLogger(__name__).warning(
            f"timm trained its weights of {cfg.MODEL.TIMM.NAME!r} on other images than the config feeds them: "
            f"INPUT.FORMAT RGB, {wanted}; found {cfg.INPUT.FORMAT}, {found}."
        )


def timm_options(cfg: CfgNode) -> Dict[str, Any]:
    """``MODEL.TIMM.OPTS`` as keyword arguments; a ``ValueError`` if they are not pairs of a name and a value."""
    options = cfg.MODEL.TIMM.OPTS
    if len(options) % 2 or not all(isinstance(key, str) for key in options[::2]):
        raise ValueError(f"MODEL.TIMM.OPTS must be KEY, VALUE, KEY, VALUE, ..., found {list(options)}.")
    return dict(zip(options[::2], options[1::2]))


def timm_feature_network(name: str, options: Dict[str, Any], *, weights: str = "") -> nn.Module:
    """timm's network that returns a list of maps, for the arguments of :class:`TimmBackbone`, which see for errors."""
    try:
        import timm
    except ImportError:
        raise ImportError("A timm backbone needs timm: pip install timm.") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(f"MODEL.TIMM.NAME {name!r} is no timm model. Nearest: {', '.join(near) or 'none'}.")
    if weights == "pretrained" and not timm.is_model_pretrained(name):
        raise ValueError(f"timm has no weights of {name!r}: MODEL.TIMM.WEIGHTS must be a file, or '' for random ones.")
    try:
        network = timm.create_model(name, features_only=True, pretrained=weights == "pretrained", **options)
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError, TypeError) as e:
        raise ValueError(f"timm's {name!r} does not give feature maps with {options}: {e}") from e
    except OSError as e:
        raise FileNotFoundError(
            f"timm cannot fetch its weights of {name!r}; where there is no network, set MODEL.TIMM.WEIGHTS to a file "
            f"of them: {e}"
        ) from e
    if weights not in ("", "pretrained"):
        _load(network, name, weights)
    return network


def _indices_of_levels(name: str, network: nn.Module, out_features: Sequence[str]) -> Dict[str, int]:
    """The index of each wanted level among the network's maps; the deepest of several with one stride."""
    info = network.feature_info
    given = {_LEVELS.get(stride): index for index, stride in zip(info.out_indices, info.reduction())}
    missing = [level for level in out_features if level not in given]
    if missing or not out_features:
        raise ValueError(
            f"timm's {name!r} gives maps of stride {info.reduction()}, that is the levels "
            f"{[level for level in given if level]}; MODEL.TIMM.OUT_FEATURES names {list(out_features)}."
        )
    return {level: given[level] for level in out_features}


def _load(network: nn.Module, name: str, path: str) -> None:
    """timm's own weights of the whole model; those behind the features (a classifier) are not used."""
    from timm.models import load_state_dict

    try:
        state = load_state_dict(PathManager.get_local_path(path))
        state = {flat_key(key): torch.as_tensor(value) for key, value in state.items()}
    except OSError:
        raise FileNotFoundError(f"MODEL.TIMM.WEIGHTS cannot be read: {path!r}.") from None
    except Exception as e:  # damaged, foreign and hostile files fail in every way: EOFError, SafetensorError, ...
        reason = " ".join(str(e).split())[:200]
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS {path!r} is no file of timm's weights: {reason or type(e).__name__}"
        ) from e
    own = network.state_dict()
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    state = {key: state[flat_key(key)] for key in own if flat_key(key) in state}
    not_finite = [key for key, value in state.items() if not value.isfinite().all()]
    if not_finite:
        raise ValueError(f"MODEL.TIMM.WEIGHTS {path!r}: {len(not_finite)} are not finite ({not_finite[0]}).")
    try:
        network.load_state_dict({**counters, **state})
    except RuntimeError as e:
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS {path!r} do not fit timm's {name!r}: {' '.join(str(e).split())[:500]}"
        ) from None


def flat_key(key: str) -> str:
    """One spelling of a weight's name for the whole model and for its network of features."""
    return key.removeprefix("model.").replace(".", "_")


def _frozen_norm(module: nn.Module) -> nn.Module:
    # timm's own conversion: its batch norms hold an activation, which Detectron2's would drop.
    from timm.utils.model import freeze_batch_norm_2d

    return freeze_batch_norm_2d(module)
