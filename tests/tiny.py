"""Tiny real detectors: a distillation step of them takes a tenth of a second on one thread."""

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

from kd_det import DISTILLATION_LOSS_REGISTRY, add_kd_config

NUM_CLASSES = 3

# The losses of kd_det, without those that tests register.
LOSSES = sorted(name for name, cls in DISTILLATION_LOSS_REGISTRY if cls.__module__.startswith("kd_det."))
# Those of a Faster R-CNN.
OTHER_HEADS = ("DenseSoftTargetLoss", "CrossKDLoss", "MaskSoftTargetLoss", "KeypointSoftTargetLoss")
RCNN_LOSSES = [n for n in LOSSES if n not in ("GradientAttentionLoss", *OTHER_HEADS)]

# Heads of masks and keypoints, as options of the tiny R-CNNs.
MASK = {
    "MODEL__MASK_ON": True,
    "MODEL__ROI_MASK_HEAD__NAME": "MaskRCNNConvUpsampleHead",
    "MODEL__ROI_MASK_HEAD__NUM_CONV": 1,
    "MODEL__ROI_MASK_HEAD__CONV_DIM": 4,
    "MODEL__ROI_MASK_HEAD__POOLER_RESOLUTION": 4,
}
KEYPOINT = {
    "MODEL__KEYPOINT_ON": True,
    "MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": 5,
    "MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS": [4],
    "MODEL__ROI_KEYPOINT_HEAD__POOLER_RESOLUTION": 4,
}


def tiny_resnet(cfg: CfgNode) -> ResNet:
    """One block a stage; RES2_OUT_CHANNELS is res2's width; DEPTH 18 gives basic blocks, 50 bottlenecks."""
    width, norm = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM
    stem = BasicStem(3, width, norm=norm)
    stages, in_channels = [], width
    for i in range(4):
        out_channels = width * 2**i
        kwargs = {"stride_per_block": [1 if i == 0 else 2], "in_channels": in_channels, "out_channels": out_channels}
        block = BasicBlock
        if cfg.MODEL.RESNETS.DEPTH > 34:
            block, kwargs["bottleneck_channels"] = BottleneckBlock, max(out_channels // 2, 2)
        stages.append(ResNet.make_stage(block, 1, norm=norm, **kwargs))
        in_channels = out_channels
    resnet = ResNet(stem, stages, out_features=["res2", "res3", "res4", "res5"])
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_tiny_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec):
    return FPN(
        tiny_resnet(cfg), ["res2", "res3", "res4", "res5"], cfg.MODEL.FPN.OUT_CHANNELS, top_block=LastLevelMaxPool()
    )


@BACKBONE_REGISTRY.register()
def build_tiny_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec):
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7(tiny_resnet(cfg).output_shape()["res5"].channels, channels)
    return FPN(tiny_resnet(cfg), ["res3", "res4", "res5"], channels, top_block=top_block)


def tiny_retinanet_cfg(**opts) -> CfgNode:
    """A tiny RetinaNet on p3 to p7."""
    defaults = {
        "MODEL__META_ARCHITECTURE": "RetinaNet",
        "MODEL__BACKBONE__NAME": "build_tiny_retinanet_fpn_backbone",
        "MODEL__RETINANET__NUM_CLASSES": NUM_CLASSES,
        "MODEL__RETINANET__NUM_CONVS": 1,
    }
    return tiny_cfg(**{**defaults, **opts})


def tiny_fcos(*, num_classes: int = NUM_CLASSES, num_convs: int = 1, **opts) -> FCOS:
    """A tiny FCOS on p3 to p7, which Detectron2 builds from LazyConfigs only."""
    cfg = tiny_retinanet_cfg(**opts)
    backbone, levels = build_tiny_retinanet_fpn_backbone(cfg, None), ["p3", "p4", "p5", "p6", "p7"]
    shapes = [backbone.output_shape()[level] for level in levels]
    head = FCOSHead(input_shape=shapes, num_classes=num_classes, conv_dims=[shapes[0].channels] * num_convs)
    model = FCOS(
        backbone=backbone,
        head=head,
        head_in_features=levels,
        num_classes=num_classes,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    model.input_format = "BGR"
    return model


def tiny_cfg(*, depth: int = 18, width: int = 4, fpn: int = 8, **opts) -> CfgNode:
    """A tiny Faster R-CNN with FPN, with KD keys that switch nothing on. ``opts``: ``MODEL__DEVICE="cpu"`` style."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_list(
        [
            "MODEL.DEVICE", "cpu",
            "MODEL.BACKBONE.NAME", "build_tiny_fpn_backbone",
            "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.PIXEL_STD", [57.375, 57.120, 58.395],
            "MODEL.RESNETS.DEPTH", depth,
            "MODEL.RESNETS.NORM", "BN",
            "MODEL.RESNETS.RES2_OUT_CHANNELS", width,
            "MODEL.FPN.OUT_CHANNELS", fpn,
            "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]],
            "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50,
            "MODEL.RPN.PRE_NMS_TOPK_TEST", 50,
            "MODEL.RPN.POST_NMS_TOPK_TEST", 20,
            "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
            "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
            "MODEL.ROI_HEADS.NUM_CLASSES", NUM_CLASSES,
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
            "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
            "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
            "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3,
        ]
    )  # fmt: skip
    for key, value in opts.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def distillation_cfg(tmp_path, *losses: str, teacher=None, **opts) -> CfgNode:
    """A tiny student's config with a tiny teacher, whose config and (random) weights are written to ``tmp_path``."""
    teacher = teacher or tiny_cfg(depth=50, width=8)
    torch.manual_seed(1)
    model = build_model(teacher).train()
    with torch.no_grad():  # batch-norm statistics as a trained network has them
        for _ in range(30):
            model.backbone(model.preprocess_image(batch()).tensor)
        for name, parameter in model.named_parameters():
            if name.endswith("cls_score.weight"):  # opinions, as a trained network has them
                parameter.mul_(50)
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    cfg = tiny_cfg(
        MODEL__META_ARCHITECTURE="Distiller",
        KD__LOSSES=losses,
        KD__TEACHER__CONFIG_FILE=str(tmp_path / "teacher.yaml"),
        KD__TEACHER__WEIGHTS=str(tmp_path / "teacher.pth"),
    )
    for key, value in opts.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def batch(sizes=((64, 96), (48, 64)), seed: int = 0):
    """Batched inputs with three boxes each, of unequal, non-square sizes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for height, width in sizes:
        corner = torch.rand(3, 2, generator=generator) * torch.tensor([width / 2, height / 2])
        extent = 8 + torch.rand(3, 2, generator=generator) * torch.tensor([width / 2 - 8, height / 2 - 8])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        instances.gt_classes = torch.randint(NUM_CLASSES, (3,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def with_masks(inputs):
    """A mask in each box: its upper left triangle."""
    for x in inputs:
        height, width = x["image"].shape[-2:]
        boxes = x["instances"].gt_boxes.tensor[:, :, None, None]
        across = (torch.arange(width) - boxes[:, 0]) / (boxes[:, 2] - boxes[:, 0])
        down = (torch.arange(height)[:, None] - boxes[:, 1]) / (boxes[:, 3] - boxes[:, 1])
        x["instances"].gt_masks = BitMasks((across >= 0) & (down >= 0) & (across + down < 1))
    return inputs


def with_keypoints(inputs, *, seed: int = 0):
    """Five keypoints an object, around its box; one in five is not visible."""
    generator = torch.Generator().manual_seed(seed)
    for x in inputs:
        boxes = x["instances"].gt_boxes.tensor[:, None]
        corner, extent = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
        points = corner + extent * (1.4 * torch.rand(len(boxes), 5, 2, generator=generator) - 0.2)
        visible = 2.0 * (torch.arange(5) > 0).expand(len(boxes), 5)[..., None]
        x["instances"].gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
    return inputs
