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

from kd_det.weights.convert import (
    IMAGENET_METADATA,
    backbone_metadata,
    check_normalisation,
    classifier_names,
    convert_resnet,
    read_weights,
    resnet_options,
    save_backbone,
)

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
    # Of the C4 detector, res5 belongs to the ROI heads, whose blocks are bottlenecks that a ResNet-18 does not have.
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
    for name in ("a.pth", "a.safetensors"):
        assert read_weights(str(tmp_path / name))["conv1.weight"].tolist() == [0, 1, 2]
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:200])
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="not a readable weight file"):
        read_weights(str(tmp_path / "cut.pth"))
    with pytest.raises(ValueError, match="holds no named weights.*found list"):
        read_weights(str(tmp_path / "list.pth"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_weights(str(tmp_path / "none.pth"))


class Command:
    def __reduce__(self):
        return (print, ("run",))


def test_a_hostile_file_is_not_run(tmp_path, capsys):
    torch.save({"conv1.weight": Command()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="not a readable weight file"):
        read_weights(str(tmp_path / "hostile.pth"))
    assert capsys.readouterr().out == ""


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
    assert found.stderr.splitlines()[-1] == "error: The weight file 'none.pth' does not exist."
