"""
Detections of torchvision's detectors and of their counterparts in Detectron2 on photographs. Weights are random, with a
spread that makes them detect something. The outputs for labels that COCO does not use are pushed down: they would
have a share in torchvision's softmax and, in a random network, detections of their own.
"""

import re
from functools import partial

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.models import detection, get_model, get_model_weights, resnet18
from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from kd_det import Distiller, build_teacher
from kd_det.cli.convert import main
from kd_det.losses import DenseSoftTargetLoss, DKDLoss, NSTLoss, SoftTargetLoss
from kd_det.teachers import get_teacher_cfg
from kd_det.teachers.torchvision_detectors import configure_torchvision_detector, torchvision_detector
from kd_det.teachers.torchvision_parts import TorchvisionAnchorGenerator
from kd_det.weights.strict import load_strictly
from kd_det.weights.torchvision_detectors import kept_labels
from tests.tiny import batch, tiny_cfg, tiny_retinanet_cfg

LAYERS = [1, 2, 3, 4]
BN, GN = nn.BatchNorm2d, partial(nn.GroupNorm, 32)
SIZE = {"min_size": 128, "max_size": 1000}
COCO = MetadataCatalog.get("coco_2017_val")
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
    images = [torch.tensor(image).permute(2, 0, 1)[:, 100:, 200:] for image in load_sample_images().images]
    return [image[:, :height, :width] for image, (height, width) in zip(images, sizes)]


def small_backbone(top=None, layers=LAYERS, channels=32, norm=None):
    """A ResNet-18 with a narrow pyramid."""
    returned = {f"layer{layer}": str(i) for i, layer in enumerate(layers)}
    widths = [64 * 2 ** (layer - 1) for layer in layers]
    top = top and LastLevelP6P7(top, channels)
    return BackboneWithFPN(resnet18(weights=None), returned, widths, channels, top, norm)


def small(name, num_classes=None, **_):
    """A narrow detector with the parts of the named one."""
    num_labels = num_classes or (2 if name.startswith("keypoint") else 91)
    is_v2 = name.endswith("_v2")
    if name.startswith("retinanet"):
        backbone = small_backbone(512 if is_v2 else 32, LAYERS[1:])
        head = detection.retinanet.RetinaNetHead(32, 9, num_labels, norm_layer=GN if is_v2 else None)
        return detection.RetinaNet(backbone, num_labels, head=head, **SIZE)
    if name.startswith("fcos"):
        return detection.FCOS(small_backbone(32, LAYERS[1:]), num_labels, **SIZE)
    options = dict(SIZE)
    if is_v2:
        options["rpn_head"] = faster_rcnn.RPNHead(32, 3, conv_depth=2)
        options["box_head"] = faster_rcnn.FastRCNNConvFCHead((32, 7, 7), [24, 24], [64], norm_layer=BN)
    else:
        options["box_head"] = faster_rcnn.TwoMLPHead(32 * 49, 64)
    options["box_predictor"] = faster_rcnn.FastRCNNPredictor(64, num_labels)
    if name.startswith("mask"):
        options["mask_head"] = mask_rcnn.MaskRCNNHeads(32, [24, 24], 1, norm_layer=BN if is_v2 else None)
        options["mask_predictor"] = mask_rcnn.MaskRCNNPredictor(24, 24, num_labels)
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
            module.eps = 0.2  # no norm of Detectron2's has it
    is_dense = not isinstance(detector, detection.FasterRCNN)
    spreads = {"cls_logits": 1.5, "bbox_reg": 0.4, "bbox_ctrness": 1, "bbox_pred": 0.4, "cls_score": 2}
    for name, module in detector.eval().named_modules():
        last = name.rpartition(".")[2]
        if last in spreads:
            mean = -4 if last == "cls_logits" and is_dense else 0
            spread = 2 if name.endswith("box_predictor.bbox_pred") else spreads[last]
            module.register_forward_hook(partial(standardise, mean=mean, spread=spread))
    with torch.no_grad():
        detector([image / 255 for image in photographs((128, 160))])
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
    is_dense = not isinstance(detector, detection.FasterRCNN)
    last = detector.head.classification_head.cls_logits if is_dense else detector.roi_heads.box_predictor.cls_score
    if last.bias.numel() % 91 == 0:
        used = kept_labels(91) if is_dense else [0, *kept_labels(91)]
        last.bias.data.view(-1, 91)[:, [label for label in range(91) if label not in used]] = -100


def both(detector, images):
    """
    The results for images that neither network resizes: torchvision's, and Detectron2's with its own names of fields.
    torchvision's masks are left as they are before they are pasted into the image.
    """
    converted = torchvision_detector(detector)
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
        assert len(theirs["scores"]) == len(ours) > 3
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


def test_anchors():
    """Where the padded image is no multiple of a level's stride, torchvision's strides are less than 64 and 128."""
    sizes, ratios = [[x, int(1.26 * x), int(1.59 * x)] for x in (32, 64, 128, 256, 512)], [0.5, 1.0, 2.0]
    generator = AnchorGenerator(sizes, [ratios] * 5)
    features = [torch.zeros(1, 1, h, w) for h, w in ((20, 28), (10, 14), (5, 7), (3, 4), (2, 2))]
    images = ImageList(torch.zeros(1, 3, 160, 224), [(160, 224)])
    theirs = generator(images, features)[0].split([9 * f.shape[2] * f.shape[3] for f in features])
    strides = [8, 16, 32, 64, 128]
    ours = TorchvisionAnchorGenerator(sizes=sizes, aspect_ratios=[ratios], strides=strides, offset=0.0)(features)
    for want, found in zip(theirs, ours):
        # A cell of torchvision's has the sizes inside the aspect ratios.
        want = want.view(-1, 3, 3, 4).transpose(1, 2).reshape(-1, 4)
        assert torch.equal(found.tensor, want)


def test_classes_are_detectron2s():
    ids = COCO.thing_dataset_id_to_contiguous_id
    assert kept_labels(91) == [label for label in range(91) if label in ids] and kept_labels(4) == [1, 2, 3]
    categories = get_model_weights("fcos_resnet50_fpn").DEFAULT.meta["categories"]
    assert [categories[label] for label in kept_labels(91)] == COCO.thing_classes
    detector = small("fasterrcnn_resnet50_fpn")
    converted = torchvision_detector(detector)
    assert converted.class_names == tuple(COCO.thing_classes) and converted.roi_heads.num_classes == 80
    theirs, ours = detector.roi_heads.box_predictor, converted.roi_heads.box_predictor
    person, dog, background = COCO.thing_classes.index("person"), COCO.thing_classes.index("dog"), 80
    for mine, label in ((person, categories.index("person")), (dog, categories.index("dog")), (background, 0)):
        assert torch.equal(ours.cls_score.weight[mine], theirs.cls_score.weight[label])
    assert torch.equal(ours.bbox_pred.weight.view(80, 4, -1)[dog], theirs.bbox_pred.weight.view(91, 4, -1)[18])
    # A detector of one's own classes.
    detector.roi_heads.box_predictor = faster_rcnn.FastRCNNPredictor(64, 4)
    converted = torchvision_detector(detector)
    assert converted.roi_heads.num_classes == 3 and converted.class_names == ()


@pytest.mark.parametrize(
    "name, loss",
    [
        ("fasterrcnn_resnet50_fpn", SoftTargetLoss()),
        ("fasterrcnn_resnet50_fpn_v2", DKDLoss()),
        ("maskrcnn_resnet50_fpn_v2", NSTLoss(student_taps=["p3", "res4.pre_activation"])),
        ("retinanet_resnet50_fpn", NSTLoss(student_taps=["p3", "res4"])),
        ("fcos_resnet50_fpn", NSTLoss(student_taps=["p3", "res4"])),
    ],
    ids=str,
)
def test_it_teaches(name, loss):
    torch.manual_seed(0)
    student = build_model(tiny_cfg(MODEL__ROI_HEADS__NUM_CLASSES=80))
    losses = Distiller(student=student, teacher=torchvision_detector(small(name)), losses=[loss]).train()(batch())
    (key,) = (key for key in losses if key.startswith(("loss_nst", "loss_soft", "loss_dkd")))
    losses[key].backward()
    assert losses[key] > 0


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"])
def test_it_teaches_a_dense_head_with_its_anchors(name):
    cfg = tiny_retinanet_cfg()
    configure_torchvision_detector(cfg, small(name))
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = "build_tiny_retinanet_fpn_backbone", "cpu"
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 64, "BN"
    teacher = torchvision_detector(small(name))
    model = Distiller(student=build_model(cfg), teacher=teacher, losses=[DenseSoftTargetLoss()]).train()
    assert model(batch(((128, 192),)))["loss_dense_soft_target"] > 0
    if name.startswith("retinanet"):
        # Detectron2's own anchors are not rounded.
        cfg.MODEL.ANCHOR_GENERATOR.NAME = "DefaultAnchorGenerator"
        with pytest.raises(ValueError, match="anchors of level 0 are 45.25x22.63.*the teacher's 46x22"):
            Distiller(student=build_model(cfg), teacher=teacher, losses=[DenseSoftTargetLoss()])


@pytest.fixture
def published(tmp_path, monkeypatch):
    """
    A narrow detector, and its file as torchvision published its first detectors: frozen norms, and older names in the
    pyramid and the RPN. By name, torchvision builds narrow detectors.
    """
    real = torchvision.models.get_model
    narrow = lambda name, **options: (small if name in NAMES else real)(name, **options)  # noqa: E731
    monkeypatch.setattr("torchvision.models.get_model", narrow)
    torch.manual_seed(0)
    detector = small("fasterrcnn_resnet50_fpn").eval()
    state = {}
    for key, value in detector.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            key = re.sub(r"((?:inner|layer)_blocks\.\d)\.0\.", r"\1.", key)
            state[key.replace("rpn.head.conv.0.0", "rpn.head.conv")] = value
    path = tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    torch.save(state, path)
    return detector, path


def cfg_of(name, weights, **opts):
    opts |= {"MODEL__META_ARCHITECTURE": "Distiller", "KD__TEACHER__CONFIG_FILE": f"torchvision://{name}"}
    return tiny_cfg(**opts, KD__TEACHER__WEIGHTS=str(weights))


def test_by_name_with_a_file(published, tmp_path):
    detector, path = published
    found = build_teacher(cfg_of("fasterrcnn_resnet50_fpn", path))
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    want = torchvision_detector(detector).state_dict()
    assert found.input_format == "RGB" and not found.training
    assert all(torch.equal(value, want[key]) for key, value in found.state_dict().items())
    # The same weights under another name are somebody's own, whose norms have an eps.
    own = tmp_path / "own.pth"
    own.symlink_to(path)
    found = build_teacher(cfg_of("fasterrcnn_resnet50_fpn", own)).backbone.bottom_up.stem.conv1.norm.running_var
    assert torch.equal(found, detector.backbone.body.bn1.running_var)


def test_a_detector_of_other_classes_by_name(published, tmp_path):
    torch.save(small("retinanet_resnet50_fpn_v2", 4).state_dict(), tmp_path / "own.pth")
    opts = {"KD__TEACHER__OPTS": ["MODEL.RETINANET.NUM_CLASSES", 3]}
    assert build_teacher(cfg_of("retinanet_resnet50_fpn_v2", tmp_path / "own.pth", **opts)).num_classes == 3


def test_its_config(published):
    cfg = get_teacher_cfg(cfg_of("fasterrcnn_resnet50_fpn", published[1]))
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT) == (128, 1000, "RGB")
    for name in ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"):
        cfg = get_teacher_cfg(cfg_of(name, ""))
        assert cfg.MODEL.WEIGHTS.endswith("_fpn.COCO_V1") and cfg.KD.TEACHER.CLASSES == COCO.thing_classes
    cfg = get_teacher_cfg(cfg_of("keypointrcnn_resnet50_fpn", published[1]))
    assert cfg.DATASETS.TRAIN == ("keypoints_coco_2017_train",) and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1


def test_a_file_of_another_detector(published):
    with pytest.raises(ValueError, match="fit the teacher 'torchvision://retinanet_resnet50_fpn': .*size mismatch"):
        build_teacher(cfg_of("retinanet_resnet50_fpn", published[1]))
    with pytest.raises(ValueError, match="the teacher 'torchvision://maskrcnn_resnet50_fpn': 8 missing .*mask_head"):
        build_teacher(cfg_of("maskrcnn_resnet50_fpn", published[1]))
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 5]
    with pytest.raises(ValueError, match=r"do not fit.*cls_score.weight is \(91, 64\), expected \(6, 64\)"):
        build_teacher(cfg_of("fasterrcnn_resnet50_fpn", published[1], KD__TEACHER__OPTS=opts))


def own_box_head():
    detector = small("fasterrcnn_resnet50_fpn")
    detector.roi_heads.box_head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 49, 64))
    return detector


def of_mobilenet(name):
    return lambda: get_model(name, weights=None, weights_backbone=None)


@pytest.mark.parametrize(
    "build, message",
    [
        (of_mobilenet("ssdlite320_mobilenet_v3_large"), "Detectron2 has no SSD"),
        (of_mobilenet("fasterrcnn_mobilenet_v3_large_fpn"), "its backbone is no ResNet"),
        (own_box_head, "its roi_heads.box_head is a Sequential"),
        (lambda: resnet18(weights=None), "Detectron2 has no ResNet"),
    ],
)
def test_what_has_no_counterpart(build, message):
    with pytest.raises(ValueError, match=f"cannot become a detector of Detectron2: {message}.*Its features can teach"):
        torchvision_detector(build())


def test_the_command_writes_a_config_and_a_file(published, tmp_path, capsys):
    """Detectron2 loads them by itself, once kd_det is imported."""
    name, output = "fasterrcnn_resnet50_fpn", tmp_path / "v1.pth"
    main([str(published[1]), str(output), "--detector", name])
    assert f"{output}: " in capsys.readouterr().out
    cfg = get_cfg()
    cfg.merge_from_file(tmp_path / "v1.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    load_strictly(model, cfg.MODEL.WEIGHTS, who="detector")
    want = build_teacher(cfg_of(name, published[1])).state_dict()
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    # The pair is a teacher as any other.
    opts = {"KD__TEACHER__CONFIG_FILE": str(tmp_path / "v1.yaml"), "KD__TEACHER__WEIGHTS": str(output)}
    assert build_teacher(tiny_cfg(MODEL__META_ARCHITECTURE="Distiller", **opts)).input_format == "RGB"


def test_the_command_refuses_other_networks(published, tmp_path, capsys):
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "r.pth")
    for name, output, message in (
        ("resnet18", "o.pth", "torchvision's 'resnet18' is no detector that Detectron2 has"),
        ("resnet18x", "o.pth", "Unknown network of torchvision 'resnet18x'. Did you mean 'resnet18'"),
        ("fasterrcnn_resnet50_fpn", "o.yaml", "o.yaml' is the name of the config"),
    ):
        weights = published[1] if name.startswith("f") else tmp_path / "r.pth"
        with pytest.raises(SystemExit):
            main([str(weights), str(tmp_path / output), "--detector", name])
        assert message in capsys.readouterr().err
