import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model

from kd_det.backbones import TimmBackbone
from kd_det.weights.backbone_file import IMAGENET_METADATA, backbone_metadata, check_normalisation, save_backbone
from kd_det.weights.convert import classifier_names, convert_for_timm, convert_resnet, resnet_options
from kd_det.weights.files import read_weights
from kd_det.weights.strict import check_initial_weights
from tests.tiny import tiny_cfg

TOOL = Path(__file__).parents[2] / "tools" / "convert_backbone.py"


def trained(network):
    """Random statistics, scales and shifts: a wrong mapping shows."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.2), (module.bias.data, -0.2), (module.running_var, 0.5)):
                tensor.copy_(low + 0.6 * torch.rand(tensor.shape, generator=generator))
            module.weight.data.copy_(0.2 + 0.5 * torch.rand(module.weight.shape, generator=generator))
    return network.eval()


def features(network, x):
    """res2 to res5 of a torchvision or timm ResNet."""
    act = network.relu if hasattr(network, "relu") else network.act1
    x = network.maxpool(act(network.bn1(network.conv1(x))))
    maps = {}
    for i in (1, 2, 3, 4):
        x = maps[f"res{i + 1}"] = getattr(network, f"layer{i}")(x)
    return maps


def detectron2_cfg(options, norm="BN"):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = norm
    for key, value in options.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


@pytest.mark.parametrize(
    "create, name",
    [
        (torchvision.models.get_model, "resnet18"),
        (torchvision.models.get_model, "resnet34"),
        (torchvision.models.get_model, "resnet50"),
        (torchvision.models.get_model, "resnext50_32x4d"),
        (torchvision.models.get_model, "wide_resnet50_2"),
        (timm.create_model, "resnet18"),
        (timm.create_model, "resnet50"),
        pytest.param(torchvision.models.get_model, "resnet101", marks=pytest.mark.slow),
        pytest.param(timm.create_model, "resnet34", marks=pytest.mark.slow),
        pytest.param(timm.create_model, "resnet101", marks=pytest.mark.slow),
    ],
)
def test_features_are_those_of_the_source(create, name):
    network = trained(create(name))
    weights = convert_resnet(network.state_dict())
    backbone = build_backbone(detectron2_cfg(resnet_options(weights))).eval()
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = features(network, x), backbone(x)
    for level, value in expected.items():
        assert torch.allclose(found[level], value, rtol=1e-5, atol=1e-6 * value.abs().max().item()), level
        assert value.std() > 1e-3


def test_options_are_those_of_the_shapes():
    def options(name):
        return resnet_options(convert_resnet(torchvision.models.get_model(name).state_dict()))

    assert options("resnet34") == {
        "DEPTH": 34, "STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 64, "STRIDE_IN_1X1": False,
    }  # fmt: skip
    assert options("resnext50_32x4d") == {
        "DEPTH": 50, "STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 256, "STRIDE_IN_1X1": False,
        "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4,
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("config", ["pyramid", "C4"])
def test_a_detector_loads_all_of_its_backbone(tmp_path, norm, config):
    network = trained(torchvision.models.resnet18())
    path = str(tmp_path / "R-18.pkl")
    weights = convert_resnet(network.state_dict())
    save_backbone(path, weights, IMAGENET_METADATA)
    cfg = detectron2_cfg(resnet_options(weights), norm)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet" if config == "pyramid" else "GeneralizedRCNN"
    if config == "pyramid":
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    else:
        cfg.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
        cfg.MODEL.RESNETS.NORM = norm
    detector = build_model(cfg).eval()
    checkpointer = DetectionCheckpointer(detector)
    loaded = checkpointer._load_file(path)
    assert loaded["metadata"]["input_format"] == "RGB"
    found = checkpointer._load_model(loaded)
    bottom_up = getattr(detector.backbone, "bottom_up", detector.backbone)
    prefix = "backbone.bottom_up." if config == "pyramid" else "backbone."
    assert not [k for k in found.missing_keys if k.startswith(prefix)] and not found.incorrect_shapes
    # The C4 detector's res5 belongs to the ROI heads, whose blocks are bottlenecks that a ResNet-18 does not have.
    assert all(k.startswith("res5.") for k in found.unexpected_keys) and bool(found.unexpected_keys) == (config == "C4")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = features(network, x)["res4"]
        assert torch.allclose(bottom_up(x)["res4"], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_file_holds_plain_arrays_only(tmp_path):
    weights = convert_resnet(torchvision.models.resnet18().state_dict())
    save_backbone(str(tmp_path / "a" / "R-18.pkl"), weights, IMAGENET_METADATA)
    with open(tmp_path / "a" / "R-18.pkl", "rb") as f:
        content = pickle.load(f)
    assert content["__author__"] == "kd_det" and content["matching_heuristics"] is True
    assert {type(v).__name__ for v in content["model"].values()} == {"ndarray"}
    assert "stem.conv1.norm.running_var" in content["model"]
    assert not any("linear" in key or "fc" in key or "num_batches" in key for key in content["model"])
    assert content["metadata"] == IMAGENET_METADATA
    with pytest.raises(ValueError, match="ends with .pkl"):
        save_backbone(str(tmp_path / "R-18.pth"), weights, IMAGENET_METADATA)


def test_names_of_a_classifier():
    own = ["backbone.res2.0.conv1.weight", "linear.weight"]
    found = classifier_names(["conv1.weight", "layer3.5.downsample.1.bias", "fc.bias", "res2.0.conv1.weight", *own])
    assert found == {
        "res2.0.conv1.weight": "backbone.res2.0.conv1.weight",
        "conv1.weight": "backbone.stem.conv1.weight",
        "layer3.5.downsample.1.bias": "backbone.res4.5.shortcut.norm.bias",
        "fc.bias": "linear.bias",
    }


@pytest.mark.parametrize("name", ["resnet50d", "seresnet50", "resnet26"])
def test_other_resnets_are_refused(name):
    with pytest.raises(ValueError, match="Not the weights of a ResNet|No ResNet of Detectron2"):
        convert_resnet(timm.create_model(name).state_dict())


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="expected conv1, bn1, layer1 to layer4 and fc, found features.0.0.weight"):
        convert_resnet(torchvision.models.mobilenet_v2().state_dict())
    with pytest.raises(ValueError, match="found none"):
        convert_resnet({})


def test_weight_files(tmp_path):
    from safetensors.torch import save_file

    state = {"conv1.weight": torch.arange(3.0)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    save_backbone(str(tmp_path / "a.pkl"), state, {})
    for name in ("a.pth", "a.safetensors", "a.pkl"):
        assert read_weights(str(tmp_path / name), who="backbone")["conv1.weight"].tolist() == [0, 1, 2]
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:200])
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("cut.pth", "list.pth"):
        with pytest.raises(ValueError, match=f"{name} .* is truncated or not a checkpoint"):
            read_weights(str(tmp_path / name), who="backbone")
    with pytest.raises(FileNotFoundError, match="do not exist: .*none.pth"):
        read_weights(str(tmp_path / "none.pth"), who="backbone")


@pytest.mark.parametrize("name, timm_name", [("mobilenet_v2", "mobilenetv2_100"), ("efficientnet_b0",) * 2])
def test_other_networks_convert_for_timms(name, timm_name):
    """D50"""
    network = trained(torchvision.models.get_model(name))
    backbone = TimmBackbone(name=timm_name).eval()
    weights = convert_for_timm(network.state_dict(), timm_name)
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    x, seen = torch.rand(1, 3, 64, 96), []
    for module in network.features.modules():
        module.register_forward_hook(lambda m, args, output: seen.append(output))
    with torch.no_grad():
        network(x)
        found = backbone(x)
    for value in found.values():  # timm's maps are outputs of torchvision's modules
        near = [(s - value).abs().max() for s in seen if s.shape == value.shape]
        assert min(near) < 1e-3 * value.std()
    own = timm.create_model(timm_name).state_dict()
    assert list(convert_for_timm(own, timm_name)) == list(weights)


def test_weights_that_are_not_those_of_timms_network():
    other = torchvision.models.get_model("mobilenet_v2", width_mult=0.5).state_dict()
    with pytest.raises(ValueError, match=r"'mobilenetv2_100' in its order: features.0.0.weight is \(16, 3, 3, 3\)"):
        convert_for_timm(other, "mobilenetv2_100")
    with pytest.raises(ValueError, match="'mobilenetv2_100', which has 262: found 1"):
        convert_for_timm({"a": torch.zeros(1)}, "mobilenetv2_100")
    with pytest.raises(ValueError, match="no timm model. Nearest: mobilenetv2_100"):
        convert_for_timm(other, "mobilenetv2_1000")


def test_a_config_that_feeds_other_images_is_refused():
    cfg = get_cfg()
    check_normalisation({"model": {}}, cfg)
    check_normalisation({"metadata": backbone_metadata(cfg)}, cfg)
    with pytest.raises(ValueError, match="INPUT.FORMAT must be RGB, found BGR; MODEL.PIXEL_MEAN must be .*PIXEL_STD"):
        check_normalisation({"metadata": IMAGENET_METADATA}, cfg)


def test_the_tool(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")

    def run(*args):
        return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True, cwd=tmp_path)

    found = run("r18.pth", "R-18.pkl")
    assert found.returncode == 0 and (tmp_path / "R-18.pkl").is_file()
    assert "MODEL.RESNETS.DEPTH 18" in found.stdout and "INPUT.FORMAT RGB" in found.stdout
    found = run("none.pth", "R-18.pkl")
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == "error: The weights of the backbone do not exist: 'none.pth'."


def test_the_tool_converts_for_timm(tmp_path):
    network = torchvision.models.mobilenet_v2()
    torch.save(network.state_dict(), tmp_path / "v2.pth")
    command = [sys.executable, TOOL, "v2.pth", "v2.pkl", "--for", "mobilenetv2_100"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert "MODEL.TIMM.NAME mobilenetv2_100" in out and "INPUT.FORMAT RGB" in out
    options = {"MODEL__BACKBONE__NAME": "build_timm_fpn_backbone", "MODEL__TIMM__NAME": "mobilenetv2_100"}
    detector = build_model(tiny_cfg(MODEL__FPN__IN_FEATURES=["res2", "res3", "res4", "res5"], **options))
    assert check_initial_weights(detector, str(tmp_path / "v2.pkl"), who="student")["metadata"]["input_format"] == "RGB"
    stem = detector.backbone.bottom_up.network.conv_stem.weight
    assert torch.equal(stem, network.features[0][0].weight)
