"""
Detections of torchvision's detectors and of their counterparts in Detectron2 on photographs. Weights are random, with a
spread that makes them detect something. The outputs for labels that COCO does not use are pushed down: they would
have a share in torchvision's softmax and, in a random network, detections of their own.
"""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import FPN
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.models import detection, get_model, resnet18
from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from kd_det.features.taps import tap_names
from kd_det.teachers.torchvision_detectors import torchvision_detector
from kd_det.teachers.torchvision_parts import TorchvisionAnchorGenerator
from kd_det.weights.torchvision_detectors import kept_labels

LAYERS = [1, 2, 3, 4]
BN, GN = nn.BatchNorm2d, partial(nn.GroupNorm, 32)
SIZE = {"min_size": 128, "max_size": 1000}
NAMES = {
    "fasterrcnn_resnet50_fpn": detection.FasterRCNN,
    "fasterrcnn_resnet50_fpn_v2": detection.FasterRCNN,
    "maskrcnn_resnet50_fpn": detection.MaskRCNN,
    "maskrcnn_resnet50_fpn_v2": detection.MaskRCNN,
    "keypointrcnn_resnet50_fpn": detection.KeypointRCNN,
    "retinanet_resnet50_fpn": detection.RetinaNet,
    "retinanet_resnet50_fpn_v2": detection.RetinaNet,
    "fcos_resnet50_fpn": detection.FCOS,
}


def photographs(*sizes):
    """RGB, 0 to 255."""
    images = load_sample_images().images
    return [torch.tensor(image).permute(2, 0, 1)[:, 100 : 100 + h, 200 : 200 + w] for image, (h, w) in zip(images, sizes)]


def small_backbone(top=None, layers=LAYERS, channels=32, norm=None):
    """A ResNet-18 with a narrow pyramid."""
    returned = {f"layer{layer}": str(i) for i, layer in enumerate(layers)}
    widths = [64 * 2 ** (layer - 1) for layer in layers]
    top = top and LastLevelP6P7(top, channels)
    return BackboneWithFPN(resnet18(weights=None), returned, widths, channels, top, norm)


def small(name):
    """A narrow detector with the parts of the named one."""
    is_v2 = name.endswith("_v2")
    if name.startswith("retinanet"):
        backbone = small_backbone(512 if is_v2 else 32, LAYERS[1:])
        head = detection.retinanet.RetinaNetHead(32, 9, 91, norm_layer=GN if is_v2 else None)
        return detection.RetinaNet(backbone, 91, head=head, **SIZE)
    if name.startswith("fcos"):
        return detection.FCOS(small_backbone(32, LAYERS[1:]), 91, **SIZE)
    options = dict(SIZE)
    if is_v2:
        options["rpn_head"] = faster_rcnn.RPNHead(32, 3, conv_depth=2)
        options["box_head"] = faster_rcnn.FastRCNNConvFCHead((32, 7, 7), [24, 24], [64], norm_layer=BN)
    else:
        options["box_head"] = faster_rcnn.TwoMLPHead(32 * 49, 64)
    num_labels = 2 if name.startswith("keypoint") else 91
    options["box_predictor"] = faster_rcnn.FastRCNNPredictor(64, num_labels)
    if name.startswith("mask"):
        options["mask_head"] = mask_rcnn.MaskRCNNHeads(32, [24, 24], 1, norm_layer=BN if is_v2 else None)
        options["mask_predictor"] = mask_rcnn.MaskRCNNPredictor(24, 24, 91)
    if name.startswith("keypoint"):
        options["keypoint_head"] = detection.keypoint_rcnn.KeypointRCNNHeads(32, [24, 24])
        options["keypoint_predictor"] = detection.keypoint_rcnn.KeypointRCNNPredictor(24, 17)
    return NAMES[name](small_backbone(norm=BN if is_v2 else None), **options)


def trained(detector):
    """Random statistics of the norms, and predictions with a mean and spread that give detections."""
    generator = torch.Generator().manual_seed(3)
    for module in detector.modules():
        if hasattr(module, "running_var"):
            module.running_mean.copy_(0.2 * torch.rand(module.running_mean.shape, generator=generator) - 0.1)
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    is_dense = not isinstance(detector, detection.FasterRCNN)
    spreads = {"cls_logits": 1.5, "bbox_reg": 0.4, "bbox_ctrness": 1, "bbox_pred": 0.4, "cls_score": 2}
    for name, module in detector.eval().named_modules():
        last = name.rpartition(".")[2]
        if last in spreads:
            mean = -4 if last == "cls_logits" and is_dense else 0
            spread = 2 if name.endswith("box_predictor.bbox_pred") else spreads[last]
            module.register_forward_hook(partial(standardise, mean=mean, spread=spread))
    detector.transform.min_size, size = (128,), detector.transform.min_size
    with torch.no_grad():
        detector([image / 255 for image in photographs((128, 160))])
    detector.transform.min_size = size
    push_down_unused(detector)
    return detector


def standardise(module, args, output, *, mean, spread):
    """Once, at the first call: outputs of this mean and standard deviation over the whole map or batch."""
    if not hasattr(module, "standardised"):
        module.standardised = True
        scale = spread / output.std()
        module.weight.data.mul_(scale)
        module.bias.data.mul_(scale).add_(mean - scale * output.mean())
        return module(*args)


def push_down_unused(detector):
    heads = [detector.roi_heads.box_predictor.cls_score] if isinstance(detector, detection.FasterRCNN) else []
    heads = heads or [detector.head.classification_head.cls_logits]
    bias = heads[0].bias.data.view(-1, 91) if heads[0].bias.numel() % 91 == 0 else None
    if bias is not None:
        unused = set(range(len(heads) and bias.shape[1])) - set(kept_labels(91)) - {0}
        bias[:, sorted(unused | (set() if isinstance(detector, detection.FasterRCNN) else {0}))] = -100


def both(detector, images):
    """
    The results for images that neither network resizes: torchvision's, and Detectron2's with its own names of fields.
    torchvision's masks are left as they are before they are pasted into the image.
    """
    converted = torchvision_detector(detector)
    detector.transform._skip_resize = True
    detector.transform.resize = lambda image, target: (image, target)
    detector.transform.postprocess = lambda result, *sizes: result
    with torch.no_grad():
        expected = detector([image / 255 for image in images])
        inputs = [{"image": image} for image in images]
        if isinstance(detector, detection.FasterRCNN):
            found = converted.inference(inputs, do_postprocess=False)
        else:
            found = [result["instances"] for result in converted(inputs)]
    return expected, found


def assert_equal_detections(detector, images):
    labels = kept_labels(91) if not isinstance(detector, detection.KeypointRCNN) else [1]
    expected, found = both(detector, images)
    for theirs, ours in zip(expected, found):
        # Detectron2 drops what lies in the padding only, and is empty once clipped.
        is_inside = (theirs["boxes"][:, 2:] > theirs["boxes"][:, :2]).all(dim=1)
        theirs = {key: value[is_inside] for key, value in theirs.items()}
        assert len(theirs["scores"]) == len(ours) > 5
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=1e-3)
        # Equal up to the order of equal scores.
        boxes = torch.cdist(ours.pred_boxes.tensor, theirs["boxes"], p=float("inf"))
        classes = torch.tensor(labels)[ours.pred_classes][:, None] == theirs["labels"]
        scores = (ours.scores[:, None] - theirs["scores"]).abs() < 1e-3
        error, partner = boxes.masked_fill(~(classes & scores), float("inf")).min(dim=1)
        assert error.max() < 1e-3 * max(images[0].shape), error.max()
        assert len(set(partner.tolist())) == len(ours)
        if "masks" in theirs:
            torch.testing.assert_close(ours.pred_masks, theirs["masks"][partner], rtol=0, atol=1e-3)
        if "keypoints" in theirs:
            difference = (ours.pred_keypoints[..., :2] - theirs["keypoints"][partner][..., :2]).abs()
            # The largest value of a heatmap can be one of two neighbours.
            assert (difference < 0.05).float().mean() > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_equal_detections_on_photographs(name):
    torch.manual_seed(0)
    assert_equal_detections(trained(small(name)), photographs((160, 224), (192, 200)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equal_detections_at_full_size(name):
    torch.manual_seed(0)
    detector = trained(get_model(name, weights=None, weights_backbone=None))
    assert_equal_detections(detector, photographs((300, 420), (320, 400)))
