"""Student backbones that Detectron2 lacks."""

from kd_det.backbones.basic_resnet import build_basic_resnet_backbone, build_basic_resnet_fpn_backbone
from kd_det.backbones.timm_backbone import TimmBackbone, add_timm_config, build_timm_backbone, build_timm_fpn_backbone

__all__ = [
    "TimmBackbone",
    "add_timm_config",
    "build_basic_resnet_backbone",
    "build_basic_resnet_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]
