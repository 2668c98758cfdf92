"""
What torchvision's detectors have and no config of Detectron2 expresses: rounded anchors whose strides follow from the
padded image, p6 and p7 from p5, dense detectors that clip boxes before NMS, and FCOS itself.
"""

from typing import Dict, List

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    FPN,
    META_ARCH_REGISTRY,
    Backbone,
    RetinaNet,
    build_anchor_generator,
    build_backbone,
    build_resnet_backbone,
)
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

__all__ = [
    "TorchvisionAnchorGenerator",
    "TorchvisionFCOS",
    "TorchvisionRetinaNet",
    "build_resnet_fpn_p6p7_of_p5_backbone",
]


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """
    torchvision's anchors in Detectron2's order, sizes before aspect ratios. Corners of the cell anchors are rounded. A
    level's stride is the size of the padded images divided by that of its map: where p6 and p7 do not divide it,
    less than 64 and 128.
    """

    def generate_cell_anchors(self, *args) -> Tensor:
        return super().generate_cell_anchors(*args).round()

    def forward(self, features: List[Tensor]) -> List[Boxes]:
        height, width = (side * self.strides[0] for side in features[0].shape[-2:])
        anchors = []
        for feature, cells in zip(features, self.cell_anchors):
            h, w = feature.shape[-2:]
            y, x = (torch.arange(n, device=cells.device, dtype=cells.dtype) + self.offset for n in (h, w))
            y, x = torch.meshgrid(y * (height // h), x * (width // w), indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=2).view(-1, 1, 4)
            anchors.append(Boxes((shifts + cells).view(-1, 4)))
        return anchors


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_p6p7_of_p5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A ResNet with FPN whose p6 and p7 come from p5, where Detectron2's RetinaNet has them from res5."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        build_resnet_backbone(cfg, input_shape),
        cfg.MODEL.FPN.IN_FEATURES,
        channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5"),
    )


class _ClipsBeforeNMS:
    """Boxes overlap each other inside the image only, as in torchvision; Detectron2 clips what NMS has left."""

    # Private in Detectron2: between it and NMS, no public method is called.
    def _decode_per_level_predictions(self, *args) -> Instances:
        decoded = super()._decode_per_level_predictions(*args)
        decoded.pred_boxes.clip(decoded.image_size)
        return decoded


@META_ARCH_REGISTRY.register()
class TorchvisionRetinaNet(_ClipsBeforeNMS, RetinaNet):
    """Detectron2's RetinaNet with torchvision's inference."""


@META_ARCH_REGISTRY.register()
class TorchvisionFCOS(_ClipsBeforeNMS, FCOS):
    """Detectron2's FCOS with torchvision's inference and places: at the corner of a cell, not at its centre."""

    @configurable
    def __init__(self, *, anchor_generator: nn.Module, input_format: str, **kwargs):
        super().__init__(**kwargs)
        self.anchor_generator = anchor_generator
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict:
        """Detectron2 has no keys for FCOS: those of RetinaNet."""
        node = cfg.MODEL.RETINANET
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[level] for level in node.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": FCOSHead(
                input_shape=shapes,
                num_classes=node.NUM_CLASSES,
                conv_dims=[shapes[0].channels] * node.NUM_CONVS,
                norm=node.NORM,
            ),
            "head_in_features": node.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "num_classes": node.NUM_CLASSES,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }
