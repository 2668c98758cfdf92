"""The project's own backbone and ROI heads. Nothing here knows kd_det."""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, Backbone, StandardROIHeads
from torch import nn


@BACKBONE_REGISTRY.register()
class ShopBackbone(Backbone):
    """Two levels, ``fine`` (stride 8) and ``coarse`` (stride 16)."""

    def __init__(self, cfg, input_shape: ShapeSpec):
        super().__init__()
        width = cfg.SHOP.WIDTH
        self.stem = nn.Sequential(nn.Conv2d(input_shape.channels, width, 7, stride=8, padding=3), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self._out_features = ["fine", "coarse"]
        self._out_feature_channels = {"fine": width, "coarse": width}
        self._out_feature_strides = {"fine": 8, "coarse": 16}

    @property
    def size_divisibility(self) -> int:
        return 16

    def forward(self, x):
        fine = self.stem(x)
        return {"fine": fine, "coarse": self.deep(fine)}


@ROI_HEADS_REGISTRY.register()
class ShopROIHeads(StandardROIHeads):
    """Also counts the objects of an image."""

    @configurable
    def __init__(self, *, counted_feature: str, counted_channels: int, **kwargs):
        super().__init__(**kwargs)
        self.counted_feature = counted_feature
        self.count = nn.Linear(counted_channels, 1)

    @classmethod
    def from_config(cls, cfg, input_shape):
        name = cfg.MODEL.ROI_HEADS.IN_FEATURES[-1]
        ret = super().from_config(cfg, input_shape)
        return {**ret, "counted_feature": name, "counted_channels": input_shape[name].channels}

    def forward(self, images, features, proposals, targets=None):
        results, losses = super().forward(images, features, proposals, targets)
        if self.training:
            counts = self.count(features[self.counted_feature].mean(dim=(2, 3)))[:, 0]
            true = torch.tensor([float(len(t)) for t in targets], device=counts.device)
            losses["loss_count"] = (counts - true).abs().mean()
        return results, losses


def add_shop_config(cfg):
    cfg.SHOP = type(cfg)({"WIDTH": 8})
