import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from torch import nn

from kd_det import add_kd_config, build_teacher
from kd_det.classification.networks import configure_network
from kd_det.teachers import Teacher
from kd_det.weights.backbone_file import backbone_metadata, backbone_weights, save_backbone
from tests.classification.tiny_classifier import classifier_cfg
from tests.weights.test_convert import features, trained

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def teacher(name, weights, **opts):
    cfg = classifier_cfg(KD__STUDENT__META_ARCHITECTURE="ImageClassifier")
    cfg.KD.TEACHER.CONFIG_FILE = name
    cfg.KD.TEACHER.WEIGHTS = str(weights)
    cfg.KD.TEACHER.OPTS = [x for pair in opts.items() for x in (pair[0].replace("__", "."), pair[1])]
    return build_teacher(cfg)


def save(network, path):
    torch.save(network.state_dict(), path)
    return path


def pixels(size=64):
    return torch.randint(256, (3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize(
    "library, create", [("torchvision", torchvision.models.get_model), ("timm", timm.create_model)]
)
def test_a_named_resnet_says_what_its_source_says(tmp_path, library, create):
    network = trained(create("resnet18", num_classes=7))
    found = teacher(
        f"{library}://resnet18",
        save(network, tmp_path / "w.pth"),
        CLASSIFICATION__NUM_CLASSES=7,
        CLASSIFICATION__INPUT_SIZE=0,
    )
    image = pixels()
    with torch.no_grad():
        x = ((image / 255 - MEAN) / STD)[None]
        expected = network(x).softmax(1)[0]
        assert torch.allclose(found([{"image": image}])[0]["scores"], expected, atol=1e-5)
        student = build_model(classifier_cfg())
        runner = Teacher(found, ["res4.pre_activation", "linear"], student=student, input_format="BGR")
        maps = runner([{"image": image.flip(0)}], x.device).features
        assert torch.allclose(maps["res4.pre_activation"][0].relu(), features(network, x)["res4"], atol=1e-4)
        assert torch.allclose(maps["linear"][0], network(x), atol=1e-4)
    assert found.input_format == "RGB"


@pytest.mark.parametrize(
    "name, create, level, module",
    [
        ("timm://mobilenetv2_100", timm.create_model, "res4", "blocks.4"),
        ("torchvision://mobilenet_v2", torchvision.models.get_model, "network.features.7", "features.7"),
    ],
)
def test_a_named_network_is_taken_whole(tmp_path, name, create, level, module):
    network = trained(create(name.partition("://")[2], num_classes=5))
    found = teacher(name, save(network, tmp_path / "w.pth"), CLASSIFICATION__NUM_CLASSES=5)
    assert type(found).__name__ == "NetworkClassifier"
    image, seen = pixels(48), []
    network.get_submodule(module).register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        x = ((image / 255 - MEAN) / STD)[None]
        x = F.interpolate(x, size=(224, 224), mode="bilinear", antialias=True)  # its own input size
        expected = network(x)
    runner = Teacher(found, [level, "linear"], student=build_model(classifier_cfg()), input_format="RGB")
    maps = runner([{"image": image}], x.device).features
    assert torch.allclose(maps["linear"][0], expected, atol=1e-4)
    assert torch.allclose(maps[level][0], seen[0], atol=1e-4)


@pytest.mark.parametrize("name", ["torchvision://mobilenet_v2", "torchvision://vit_b_16", "timm://levit_128s"])
def test_a_networks_head_is_no_part_of_its_backbone(name):
    cfg = classifier_cfg()
    configure_network(cfg, name)
    model = build_model(cfg)
    found = {key.removeprefix("network.") for key in backbone_weights(model)}
    heads = {"mobilenet_v2": "classifier.", "vit_b_16": "heads.", "levit_128s": ("head.", "head_dist.")}
    own = {key for key in model.backbone.network.state_dict() if not key.endswith("num_batches_tracked")}
    dropped = {key for key in own if key.startswith(heads[name.partition("://")[2]])}
    assert dropped and found == own - dropped


def test_the_backbone_of_a_timm_network_is_a_detectors(tmp_path):
    cfg = classifier_cfg(CLASSIFICATION__NUM_CLASSES=5)
    configure_network(cfg, "timm://mobilenetv2_100")
    classifier = build_model(cfg).eval()
    trained(classifier.backbone.network)
    save_backbone(str(tmp_path / "backbone.pkl"), backbone_weights(classifier), backbone_metadata(cfg))
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.TIMM.NAME = "mobilenetv2_100"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    detector = nn.ModuleDict({"backbone": build_backbone(cfg)}).eval()
    keys = DetectionCheckpointer(detector)._load_model(
        DetectionCheckpointer(detector)._load_file(str(tmp_path / "backbone.pkl"))
    )
    assert not [key for key in keys.missing_keys if "bottom_up" in key]
    x = torch.rand(1, 3, 64, 64)
    maps, taps = {}, classifier.backbone
    for level in ("res2", "res3", "res4", "res5"):
        getattr(taps, level).register_forward_hook(lambda m, args, out, level=level: maps.update({level: out}))
    with torch.no_grad():
        taps.network(x)
        for level, map in detector["backbone"].bottom_up(x).items():
            assert torch.allclose(map, maps[level], atol=1e-5)


@pytest.mark.parametrize(
    "name, message",
    [
        ("torchvision://resnet51", "Unknown classifier of torchvision 'resnet51'. Did you mean 'resnet"),
        ("timm://mobilenet_v9", "Unknown model of timm 'mobilenet_v9'. Did you mean 'mobilenet"),
        ("timm://resnet50.no_such", "Unknown weights of timm's 'resnet50' 'no_such'"),
        ("torchvison://resnet50", "is a URL. Expected .* as timm://NAME, torchvision://NAME"),
    ],
)
def test_names_that_do_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        teacher(name, "w.pth")


def test_weights_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        teacher("torchvision://resnet18", tmp_path / "none.pth")
    weights = save(torchvision.models.resnet18(num_classes=3), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="do not fit .*; they classify 3 classes, not 1000"):
        teacher("torchvision://resnet18", weights)
    weights = save(torchvision.models.resnet34(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="do not fit the teacher 'torchvision://resnet18': .*unexpected"):
        teacher("torchvision://resnet18", weights)


def test_a_network_must_be_named():
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "NetworkClassifier"
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(ValueError, match="CLASSIFICATION.NETWORK must be torchvision://NAME or timm://NAME, found ''"):
        build_model(cfg)
