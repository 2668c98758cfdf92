"""
Any timm model with feature maps as a Detectron2 backbone, alone or under a feature pyramid.

This file needs Detectron2 and timm, and nothing else of kd_det: an exported student carries a copy of it.
"""

import difflib
from typing import Any, Dict, Optional, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

__all__ = ["TimmBackbone", "add_timm_config"]

# Detectron2's names of the levels, by stride.
_LEVELS = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
_NORMS = ("", "FrozenBN", "SyncBN")


def add_timm_config(cfg: CfgNode) -> None:
    """Add the node ``MODEL.TIMM`` to a Detectron2 config, in place."""
    cfg.MODEL.TIMM = CfgNode()
    # Name of a timm model that gives feature maps, e.g. "mobilenetv2_100" (timm.list_models()).
    cfg.MODEL.TIMM.NAME = ""
    # A file of timm's weights for it, "pretrained" (timm downloads its own), or "" (random, or from MODEL.WEIGHTS).
    cfg.MODEL.TIMM.WEIGHTS = ""
    # Batch norm: "" (the model's own), "FrozenBN", or "SyncBN". MODEL.BACKBONE.FREEZE_AT freezes whole stages.
    cfg.MODEL.TIMM.NORM = ""
    # Levels to return: res2 to res5 are the maps of stride 4 to 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
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
        norm: str = "",
        freeze_at: int = 0,
        options: Optional[Dict[str, Any]] = None,
    ):
        """
        Args:
            name: of the timm model.
            out_features: the levels to return.
            weights: a file of timm's weights, "pretrained" (timm downloads its own), or "" (random).
            norm: "" leaves batch norms as they are, "FrozenBN" and "SyncBN" replace them.
            freeze_at: as Detectron2 counts: 1 freezes what is before res2, 2 res2 as well, ..., 5 everything; 0 nothing.
                Batch norms in frozen stages become FrozenBN.
            options: further arguments of ``timm.create_model``.

        Raises:
            ImportError: timm is not installed.
            ValueError: an unknown model, one without maps at these levels, an unknown norm, or weights that do not fit.
            FileNotFoundError: the weights' file does not exist.
        """
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(f"MODEL.TIMM.NORM {norm!r}: valid are {', '.join(map(repr, _NORMS))}.")
        network = _create(name, pretrained=weights == "pretrained", **(options or {}))
        indices = _indices_of_levels(name, network, out_features)
        # A second time, to be built only as deep as it is read.
        self.net = _create(
            name, pretrained=weights == "pretrained", out_indices=sorted(indices.values()), **(options or {})
        )
        if weights and weights != "pretrained":
            _load(self.net, name, weights)

        info = self.net.feature_info
        self._order = {_LEVELS[stride]: i for i, stride in enumerate(info.reduction())}
        self._out_features = list(out_features)
        self._out_feature_channels = {level: info.channels()[i] for level, i in self._order.items()}
        self._out_feature_strides = {level: info.reduction()[i] for level, i in self._order.items()}
        # Where each level comes from, for taps at a residual block's pre-activation.
        self.stage_modules = {level: _module(self.net, info.module_name()[i]) for level, i in self._order.items()}
        self._channels_last = getattr(self.net, "output_fmt", None) == "NHWC"
        self._freeze(freeze_at)
        self._convert_norms(norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Optional[ShapeSpec] = None) -> Dict:
        node = cfg.MODEL.TIMM
        return {
            "name": node.NAME,
            "out_features": node.OUT_FEATURES,
            "weights": node.WEIGHTS,
            "norm": node.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "options": dict(zip(node.OPTS[::2], node.OPTS[1::2])),
        }

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """(N, 3, H, W) to a dict of levels, each (N, C, H / stride, W / stride)."""
        maps = self.net(x)
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return {level: maps[self._order[level]] for level in self._out_features}
