"""Student backbones that Detectron2 lacks."""

from kd_det.backbones.timm import TimmBackbone, build_timm_backbone, build_timm_fpn_backbone

__all__ = ["TimmBackbone", "build_timm_backbone", "build_timm_fpn_backbone"]
