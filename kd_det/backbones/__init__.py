"""Student backbones that Detectron2 lacks."""

from kd_det.backbones import basic_resnet  # noqa: F401  registers its builders
from kd_det.backbones.timm_backbone import TimmBackbone, add_timm_config

__all__ = ["TimmBackbone", "add_timm_config"]
