"""
torchvision's detectors as Detectron2's: Faster, Mask and Keypoint R-CNN, RetinaNet and FCOS on a ResNet with FPN.

The result is made of Detectron2's own classes, with the weights, anchors, box coder and thresholds of the given
detector, and detects what it detects on the same resized images. Masks are equal before they are pasted into the image;
the two libraries paste in different ways, which differ by a pixel at the borders.
"""

from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import faster_rcnn, keypoint_rcnn, mask_rcnn
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from kd_det.teachers.torchvision_parts import (
    TorchvisionAnchorGenerator,
    TorchvisionFCOS,
    TorchvisionRetinaNet,
    build_resnet_fpn_p6p7_of_p5_backbone,
)
from kd_det.weights.convert import convert_resnet, resnet_options
from kd_det.weights.torchvision_detectors import COCO_LABELS, copy_detector_weights, kept_labels

__all__ = ["configure_torchvision_detector", "torchvision_detector", "why_not_convertible"]

_NORMS = {"BatchNorm2d": "BN", "FrozenBatchNorm2d": "FrozenBN", "GroupNorm": "GN"}
# What each part of a detector must be; one that somebody replaced by a network of their own has no counterpart.
_PARTS = {
    "rpn.head": faster_rcnn.RPNHead,
    "roi_heads.box_head": (faster_rcnn.TwoMLPHead, faster_rcnn.FastRCNNConvFCHead),
    "roi_heads.box_predictor": faster_rcnn.FastRCNNPredictor,
    "roi_heads.mask_head": mask_rcnn.MaskRCNNHeads,
    "roi_heads.mask_predictor": mask_rcnn.MaskRCNNPredictor,
    "roi_heads.keypoint_head": keypoint_rcnn.KeypointRCNNHeads,
    "roi_heads.keypoint_predictor": keypoint_rcnn.KeypointRCNNPredictor,
    "head": (detection.retinanet.RetinaNetHead, detection.fcos.FCOSHead),
    "backbone.fpn.extra_blocks": (LastLevelMaxPool, LastLevelP6P7),
}


def torchvision_detector(detector: nn.Module) -> nn.Module:
    """
    A detector of ``torchvision.models.detection`` as one of Detectron2, in eval mode, with ``input_format`` "RGB", and
    COCO's ``class_names`` if it has COCO's labels.

    COCO's 91 labels become Detectron2's 80 contiguous classes: the outputs for labels that COCO does not use are left
    out, so a box head's softmax has no share for them. Any other number of labels is the background and N classes.

    Raises:
        ValueError: a detector without counterpart in Detectron2 (SSD; another backbone than a ResNet; own heads).
    """
    cfg = get_cfg()
    configure_torchvision_detector(cfg, detector)
    cfg.MODEL.DEVICE = str(next(detector.parameters()).device)
    converted = build_model(cfg)
    copy_detector_weights(detector, converted)
    converted.input_format = cfg.INPUT.FORMAT
    known = [MetadataCatalog.get(name).thing_classes for name in cfg.DATASETS.TRAIN]
    converted.class_names = tuple(known[0]) if known else ()
    return converted.eval()


def configure_torchvision_detector(cfg: CfgNode, detector: nn.Module) -> None:
    """
    Turn a config into that of a detector of torchvision, in place; its weights are not read. What only training uses
    (matching, sampling, losses) stays as it is.

    Raises:
        ValueError: see :func:`torchvision_detector`.
    """
    problem = why_not_convertible(detector)
    if problem is not None:
        raise ValueError(
            f"torchvision's {type(detector).__name__} cannot become a detector of Detectron2: {problem}. Its features "
            f"can teach: kd_det.teachers.torchvision_teacher."
        )
    levels = _configure_backbone(cfg, detector.backbone)
    transform = detector.transform
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = transform.min_size[-1], transform.max_size
    cfg.MODEL.PIXEL_MEAN = [255 * x for x in transform.image_mean]
    cfg.MODEL.PIXEL_STD = [255 * x for x in transform.image_std]
    is_dense = not isinstance(detector, detection.FasterRCNN)
    num_labels = (_configure_dense if is_dense else _configure_rcnn)(cfg, detector, levels)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = len(kept_labels(num_labels))
    if num_labels == COCO_LABELS:
        cfg.DATASETS.TRAIN = ("coco_2017_train",)
    elif cfg.MODEL.KEYPOINT_ON and num_labels == 2:
        cfg.DATASETS.TRAIN = ("keypoints_coco_2017_train",)


def why_not_convertible(detector: nn.Module) -> str | None:
    """What of a detector has no counterpart in Detectron2; None if it can become one of Detectron2's."""
    if not isinstance(detector, (detection.FasterRCNN, detection.RetinaNet, detection.FCOS)):
        return f"Detectron2 has no {type(detector).__name__}"
    if [*getattr(getattr(detector.backbone, "body", None), "return_layers", ())][-1:] != ["layer4"]:
        return "its backbone is no ResNet whose pyramid ends at layer4"
    modules = dict(detector.named_modules())
    for name, expected in _PARTS.items():
        if not isinstance(modules.get(name), (type(None), *_as_tuple(expected))):
            return f"its {name} is a {type(modules[name]).__name__}"
    return None


def _as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _configure_backbone(cfg: CfgNode, backbone: nn.Module) -> list[str]:
    """The pyramid's levels, from the finest."""
    stages = [f"res{int(layer[-1]) + 1}" for layer in backbone.body.return_layers]
    top, model = backbone.fpn.extra_blocks, cfg.MODEL
    builders = {"LastLevelMaxPool": "build_resnet_fpn_backbone", "LastLevelP6P7": "build_retinanet_resnet_fpn_backbone"}
    model.BACKBONE.NAME = builders[type(top).__name__]
    if getattr(top, "use_P5", False):
        model.BACKBONE.NAME = build_resnet_fpn_p6p7_of_p5_backbone.__name__
    model.BACKBONE.FREEZE_AT = 0
    for key, value in resnet_options(convert_resnet(backbone.body.state_dict())).items():
        model.RESNETS[key] = value
    model.RESNETS.NORM = "FrozenBN"
    model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = stages
    model.FPN.OUT_CHANNELS = backbone.out_channels
    model.FPN.NORM = _norm(backbone.fpn.layer_blocks)
    return [f"p{stage[-1]}" for stage in stages] + ["p6", "p7"][: 1 if isinstance(top, LastLevelMaxPool) else 2]


def _configure_anchors(cfg: CfgNode, anchors: nn.Module) -> None:
    node = cfg.MODEL.ANCHOR_GENERATOR
    node.NAME, node.OFFSET = TorchvisionAnchorGenerator.__name__, 0.0
    node.SIZES = [list(sizes) for sizes in anchors.sizes]
    node.ASPECT_RATIOS = [list(ratios) for ratios in anchors.aspect_ratios]


def _configure_dense(cfg: CfgNode, detector: nn.Module, levels: Sequence[str]) -> int:
    """How many labels the detector has, the background among them."""
    is_fcos, head, node = isinstance(detector, detection.FCOS), detector.head.classification_head, cfg.MODEL.RETINANET
    cfg.MODEL.META_ARCHITECTURE = (TorchvisionFCOS if is_fcos else TorchvisionRetinaNet).__name__
    _configure_anchors(cfg, detector.anchor_generator)
    node.IN_FEATURES = levels
    node.NUM_CONVS = sum(isinstance(module, nn.Conv2d) for module in head.conv.modules())
    node.NORM = _norm(head.conv)
    node.SCORE_THRESH_TEST = detector.score_thresh
    node.TOPK_CANDIDATES_TEST = detector.topk_candidates
    node.NMS_THRESH_TEST = detector.nms_thresh
    cfg.TEST.DETECTIONS_PER_IMAGE = detector.detections_per_img
    return head.num_classes


def _configure_rcnn(cfg: CfgNode, detector: nn.Module, levels: Sequence[str]) -> int:
    """As :func:`_configure_dense`."""
    rpn, heads, model = detector.rpn, detector.roi_heads, cfg.MODEL
    model.META_ARCHITECTURE = "GeneralizedRCNN"
    _configure_anchors(cfg, rpn.anchor_generator)
    model.RPN.IN_FEATURES = levels
    model.RPN.CONV_DIMS = [-1] * len(rpn.head.conv)
    model.RPN.NMS_THRESH = rpn.nms_thresh
    # Not public in torchvision: its methods give the number for the mode that the detector is in.
    model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST = (
        top_n["testing"] for top_n in (rpn._pre_nms_top_n, rpn._post_nms_top_n)
    )
    model.ROI_HEADS.NAME = "StandardROIHeads"
    pooled = heads.box_roi_pool.featmap_names  # "0", "1", ... and "pool"
    model.ROI_HEADS.IN_FEATURES = [level for i, level in enumerate(levels) if str(i) in pooled]
    model.ROI_HEADS.SCORE_THRESH_TEST = heads.score_thresh
    model.ROI_HEADS.NMS_THRESH_TEST = heads.nms_thresh
    cfg.TEST.DETECTIONS_PER_IMAGE = heads.detections_per_img
    box = model.ROI_BOX_HEAD
    _configure_pooler(box, heads.box_roi_pool)
    convs, linears = ([m for m in heads.box_head.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.Linear))
    box.NAME = "FastRCNNConvFCHead"
    box.NUM_CONV, box.NUM_FC, box.FC_DIM = len(convs), len(linears), linears[-1].out_features
    box.CONV_DIM = convs[-1].out_channels if convs else box.CONV_DIM
    box.NORM = _norm(heads.box_head)
    box.BBOX_REG_WEIGHTS = heads.box_coder.weights
    model.MASK_ON, model.KEYPOINT_ON = heads.has_mask(), heads.has_keypoint()
    if model.MASK_ON:
        _configure_pooler(model.ROI_MASK_HEAD, heads.mask_roi_pool)
        model.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        model.ROI_MASK_HEAD.NUM_CONV = len(heads.mask_head)
        model.ROI_MASK_HEAD.CONV_DIM = heads.mask_predictor.conv5_mask.out_channels
        model.ROI_MASK_HEAD.NORM = _norm(heads.mask_head)
    if model.KEYPOINT_ON:
        _configure_pooler(model.ROI_KEYPOINT_HEAD, heads.keypoint_roi_pool)
        model.ROI_KEYPOINT_HEAD.CONV_DIMS = [m.out_channels for m in heads.keypoint_head if isinstance(m, nn.Conv2d)]
        model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = heads.keypoint_predictor.out_channels
    return heads.box_predictor.cls_score.out_features


def _configure_pooler(node: CfgNode, pool: nn.Module) -> None:
    node.POOLER_TYPE = "ROIAlign"
    node.POOLER_RESOLUTION, node.POOLER_SAMPLING_RATIO = pool.output_size[0], pool.sampling_ratio


def _norm(module: nn.Module) -> str:
    """Detectron2's name of the kind of norm inside; empty without one."""
    return next((_NORMS[type(m).__name__] for m in module.modules() if type(m).__name__ in _NORMS), "")
