"""
Detectron2's ResNets of basic blocks in any width, alone or under a feature pyramid.

This file needs Detectron2 and nothing else of kd_det: an exported student carries a copy of it.
"""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

__all__ = ["build_basic_resnet_backbone", "build_basic_resnet_fpn_backbone"]

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@BACKBONE_REGISTRY.register()
def build_basic_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """
    What ``build_resnet_backbone`` builds for ``MODEL.RESNETS.DEPTH`` 18 and 34, but of ``STEM_OUT_CHANNELS`` and
    ``RES2_OUT_CHANNELS`` that need not be 64; a ``ValueError`` for another depth.
    """
    node = cfg.MODEL.RESNETS
    if node.DEPTH not in _BLOCKS:
        raise ValueError(
            f"build_basic_resnet_backbone: MODEL.RESNETS.DEPTH must be 18 or 34, found {node.DEPTH}; "
            f"build_resnet_backbone builds the others in any width."
        )
    stem = BasicStem(input_shape.channels, node.STEM_OUT_CHANNELS, norm=node.NORM)
    stages = []
    channels = {"in_channels": node.STEM_OUT_CHANNELS, "out_channels": node.RES2_OUT_CHANNELS}
    for num_blocks, stride in zip(_BLOCKS[node.DEPTH], (1, 2, 2, 2)):
        strides = [stride] + [1] * (num_blocks - 1)
        stages.append(ResNet.make_stage(BasicBlock, num_blocks, stride_per_block=strides, norm=node.NORM, **channels))
        channels = {"in_channels": channels["out_channels"], "out_channels": 2 * channels["out_channels"]}
    return ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """:func:`build_basic_resnet_backbone` under Detectron2's feature pyramid, p2 to p6."""
    node, bottom_up = cfg.MODEL.FPN, build_basic_resnet_backbone(cfg, input_shape)
    options = {"norm": node.NORM, "top_block": LastLevelMaxPool(), "fuse_type": node.FUSE_TYPE}
    return FPN(bottom_up, node.IN_FEATURES, node.OUT_CHANNELS, **options)
