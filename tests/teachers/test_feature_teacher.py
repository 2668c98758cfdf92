import copy

import pytest
import timm
import torch
from detectron2.modeling import build_model
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from kd_det import Distiller, build_teacher
from kd_det.features.taps import Taps, tap_names, tap_shape
from kd_det.losses import HintLoss, NSTLoss
from kd_det.teachers.feature_teacher import FeatureTeacher, torchvision_teacher
from tests.tiny import batch, tiny_cfg


class Strides(nn.Module):
    """Maps of stride 4, 14 and 16 by pooling; the first channel of each is the mean of the image's first channel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = x * self.scale.view(3, 1, 1)
        return {f"s{s}": nn.functional.avg_pool2d(x, s).repeat(1, s, 1, 1)[:, : 2 * s] for s in (4, 14, 16)}


def distiller(teacher, *losses):
    torch.manual_seed(0)
    return Distiller(student=build_model(tiny_cfg()), teacher=teacher, losses=losses).train()


def adapter_cfg(name, weights, *losses, **opts):
    opts = {"KD__LOSSES": losses, "KD__TEACHER__CONFIG_FILE": name, "KD__TEACHER__WEIGHTS": str(weights), **opts}
    return tiny_cfg(MODEL__META_ARCHITECTURE="Distiller", **opts)


def test_maps_are_matched_by_name_or_by_stride():
    teacher = FeatureTeacher(network=Strides())
    shapes = teacher.backbone.output_shape()
    # 14 and 16 are both nearest to 2^4: the last one is p4.
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {
        "s4": (8, 4), "s14": (28, 14), "s16": (32, 16), "p2": (8, 4), "res2": (8, 4), "p4": (32, 16), "res4": (32, 16)
    }  # fmt: skip
    assert teacher.backbone.size_divisibility == 16
    with pytest.raises(ValueError, match="tap of the teacher 'p3'.*Valid names: p4, p2, s4"):
        Taps(teacher, ["p3"], side="teacher")


def test_its_own_normalisation_in_its_own_channel_order():
    """The student's images are BGR 0 to 255; torchvision's networks take RGB, divided by 255 and standardised."""
    teacher = FeatureTeacher(network=Strides())
    model = distiller(teacher, NSTLoss(student_taps=["p2", "p4"], teacher_taps=["s4", "s14"]))
    inputs = batch(((32, 48),))
    seen = []
    teacher.backbone.network.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(inputs)
    rgb = inputs[0]["image"].flip(0).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = (rgb - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    # The student pads 32 x 48 to its 32s, the teacher to its own 16s besides: 32 x 64.
    assert seen[0].shape == (1, 3, 32, 64)
    torch.testing.assert_close(seen[0][0, :, :32, :48], want, rtol=0, atol=1e-5)
    assert torch.equal(seen[0][0, :, :, 48:], torch.zeros(3, 32, 16))


@pytest.mark.parametrize("wrap", [lambda m: m["s4"], lambda m: [m["s4"]], lambda m: (m["s4"], m["s16"]), dict])
def test_a_network_may_return_one_map_a_sequence_or_a_dict(wrap):
    network = Strides()
    network.forward = lambda x, forward=network.forward: wrap(forward(x))
    assert FeatureTeacher(network=network).backbone.output_shape()["p2"].channels == 8


def test_what_is_no_map_is_refused():
    with pytest.raises(ValueError, match=r"must give maps \(N, C, H, W\); its output '0' is \(1, 1000\)"):
        FeatureTeacher(network=get_model("mobilenet_v3_small", weights=None))
    with pytest.raises(ValueError, match="must run on images of any size; on 448 x 448 it fails"):
        FeatureTeacher(network=timm.create_model("vit_tiny_patch16_224", features_only=True))


def torchvision_detector():
    torch.manual_seed(2)
    return FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5), num_classes=3)


def test_torchvision_detector_teaches():
    detector = torchvision_detector().eval()
    teacher = torchvision_teacher(copy.deepcopy(detector))
    assert [n for n in tap_names(teacher) if n.startswith("p") and n != "pool"] == ["p2", "p3", "p4", "p5", "p6"]
    assert tap_shape(teacher, "res4.pre_activation").channels == 256
    taps = ["p3", "res4", "res4.pre_activation"]
    model = distiller(teacher, NSTLoss(student_taps=["p3", "res4", "res4.pre_activation"]))
    inputs = batch(((64, 96), (64, 96)))
    reader = Taps(teacher, taps)
    images = teacher.preprocess_image([{"image": x["image"].flip(0).float()} for x in inputs]).tensor
    with reader.recording(), torch.no_grad():
        teacher.backbone(images)
        features = {name: maps[0] for name, maps in reader.pop().items()}
    # The reference: torchvision's own transform (size unchanged) and backbone.
    with torch.no_grad():
        normalised = torch.stack([detector.transform.normalize(x["image"].flip(0) / 255.0) for x in inputs])
        want = detector.backbone(normalised)
    torch.testing.assert_close(features["p3"], want["1"], rtol=1e-3, atol=1e-4)
    assert torch.equal(features["res4.pre_activation"].relu(), features["res4"])
    assert features["res4.pre_activation"].min() < 0
    losses = model(inputs)
    losses["loss_nst"].backward()
    assert losses["loss_nst"] > 0 and all(p.grad is None for p in teacher.parameters())


def test_connectors_bridge_its_channels():
    teacher = torchvision_teacher(torchvision_detector())
    loss = HintLoss(student_taps=["p2"], student_channels=[8], teacher_channels=[256])
    assert distiller(teacher, loss)(batch())["loss_hint"] > 0


def test_torchvision_detector_by_name_with_a_local_file(tmp_path):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.manual_seed(5)
    detector = get_model(name, weights=None, weights_backbone=None, num_classes=3)
    torch.save(detector.state_dict(), tmp_path / "w.pth")
    opts = {"KD__TEACHER__OPTS": ["MODEL.ROI_HEADS.NUM_CLASSES", 2]}
    teacher = build_teacher(adapter_cfg(f"torchvision://{name}", tmp_path / "w.pth", **opts))
    own = teacher.backbone.network.state_dict()
    assert own and all(torch.equal(own[k], v) for k, v in detector.backbone.state_dict().items())
    assert teacher.input_format == "RGB" and teacher.pixel_mean.flatten()[0].item() == pytest.approx(123.675)


def test_networks_by_name_teach_through_the_config(tmp_path):
    for name, build, taps in (
        ("torchvision://resnet18", lambda: get_model("resnet18", weights=None), ("p3", "res4.pre_activation")),
        ("timm://resnet10t", lambda: timm.create_model("resnet10t"), ("p3", "res4.pre_activation")),
        ("timm://convnext_atto", lambda: timm.create_model("convnext_atto"), ("p3", "res4")),
    ):
        torch.save(build().state_dict(), tmp_path / "w.pth")
        opts = {"KD__NST__STUDENT_TAPS": taps}
        model = build_model(adapter_cfg(name, tmp_path / "w.pth", "NSTLoss", **opts)).train()
        losses = model(batch())
        assert losses["loss_nst"] > 0, name


def test_a_vision_transformer_teaches(tmp_path):
    """One map of stride 16, of any image size once timm is told so."""
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    opts = {"KD__NST__STUDENT_TAPS": ("p4",), "KD__TEACHER__OPTS": ["MODEL.TIMM.OPTS", ["dynamic_img_size", True]]}
    cfg = adapter_cfg("timm://test_vit", tmp_path / "w.pth", "NSTLoss", **opts)
    model = build_model(cfg).train()
    assert model.teacher.backbone.output_shape()["p4"].stride == 16
    assert model(batch())["loss_nst"] > 0


def test_weights_as_timm_publishes_them(tmp_path):
    network = timm.create_model("convnext_atto")
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    teacher = build_teacher(adapter_cfg("timm://convnext_atto", tmp_path / "model.safetensors"))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        want = network.eval().forward_intermediates(image, intermediates_only=True)[-1]
        torch.testing.assert_close(teacher.backbone(image)["res5"], want)


def test_region_losses_are_refused_with_the_reason(tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="the teacher has no roi_heads"):
        build_model(adapter_cfg("timm://resnet10t", tmp_path / "w.pth", "SoftTargetLoss"))
    with pytest.raises(ValueError, match="the teacher FeatureTeacher has no RPN"):
        build_model(adapter_cfg("timm://resnet10t", tmp_path / "w.pth", "RPNSoftTargetLoss"))


@pytest.mark.parametrize(
    "name,message",
    [
        ("torchvision://fasterrcnn_resnet51_fpn", "Did you mean 'fasterrcnn_resnet50_fpn"),
        ("torchvision://vit_b_32", "has no layer1 to layer4, features or trunk_output to read. Take it from timm"),
        ("timm://resnet10tt", "Unknown model of timm 'resnet10tt'. Did you mean 'resnet10t'"),
    ],
)
def test_unknown_networks(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(adapter_cfg(name, tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "other,message",
    [("resnet34", "do not fit .*31 misshapen .layer1.0.conv1.weight is"), ("vgg11", "do not fit .*missing")],
)
def test_weights_of_another_network_are_refused(tmp_path, other, message):
    torch.save(get_model(other, weights=None, num_classes=1).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        build_teacher(adapter_cfg("torchvision://resnet50", tmp_path / "w.pth"))
