"""Weights that do not fit: those of another network are refused, what Detectron2's users start from is not."""

import os
import pickle

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from torch import nn

from kd_det.weights.backbone_file import backbone_weights, save_backbone
from kd_det.weights.strict import check_initial_weights, load_strictly
from tests.tiny import tiny_cfg

LEVELS = ["res2", "res3", "res4", "res5"]


def resnet(depth: int, **opts):
    """A Faster R-CNN on Detectron2's own ResNet-18 or -34."""
    levels = {"MODEL__RESNETS__OUT_FEATURES": LEVELS, "MODEL__FPN__IN_FEATURES": LEVELS}
    opts = {"MODEL__BACKBONE__NAME": "build_resnet_fpn_backbone", **levels, **opts}
    return build_model(tiny_cfg(depth=depth, width=64, **opts))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """ImageNet weights of both depths as Detectron2 keeps them (no prefix, no pyramid), and a whole detector's."""
    folder = tmp_path_factory.mktemp("weights")
    for depth in (18, 34):
        model = resnet(depth)
        state = {name: value.numpy() for name, value in model.backbone.bottom_up.state_dict().items()}
        state["fc1000.weight"] = torch.zeros(1000, 512).numpy()
        with open(folder / f"R-{depth}.pkl", "wb") as file:
            pickle.dump({"model": state, "__author__": "torchvision", "matching_heuristics": True}, file)
    torch.save({"model": model.state_dict()}, folder / "detector.pth")
    torch.save(
        {name.replace("res", "layer").replace("stem.", ""): value for name, value in model.state_dict().items()},
        folder / "foreign.pth",
    )
    return folder


@pytest.mark.parametrize(
    "depth,name,opts",
    [
        (18, "R-18.pkl", {}),
        (34, "detector.pth", {}),
        # Other classes, another pyramid: what fine-tuning changes.
        (34, "detector.pth", {"MODEL__ROI_HEADS__NUM_CLASSES": 7, "MODEL__FPN__OUT_CHANNELS": 4}),
    ],
)
def test_weights_that_are_usual(files, depth, name, opts):
    check_initial_weights(resnet(depth, **opts), str(files / name), who="student")


def test_a_stage_that_the_backbone_does_without(files):
    cfg = tiny_cfg(width=64, MODEL__BACKBONE__NAME="build_resnet_backbone", MODEL__RESNETS__OUT_FEATURES=["res4"])
    model = nn.ModuleDict({"backbone": build_backbone(cfg)})
    check_initial_weights(model, str(files / "R-18.pkl"), who="student")


@pytest.mark.parametrize(
    "depth,name,message",
    [
        (34, "R-18.pkl", r"has 36: 16 missing .backbone.bottom_up.res2.2.conv1.weight and 15 more"),
        (18, "R-34.pkl", r"has 20: 16 left over .res2.2.conv1.weight and 15 more"),
        (18, "foreign.pth", r"has 20: 20 missing .*tools/convert_backbone.py"),
    ],
)
def test_weights_of_another_network(files, caplog, depth, name, message):
    with pytest.raises(ValueError, match=f"are another network's than the backbone of the student, which {message}"):
        check_initial_weights(resnet(depth), str(files / name), who="student")
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_weights_of_another_width(tmp_path):
    torch.save({"model": build_model(tiny_cfg(width=8)).state_dict()}, tmp_path / "wide.pth")
    stem = r"backbone.bottom_up.stem.conv1.weight is \(8, 3, 7, 7\), expected \(4, 3, 7, 7\)"
    with pytest.raises(ValueError, match=rf"has 12: 12 misshapen \({stem} and 11 more\)"):
        check_initial_weights(build_model(tiny_cfg(width=4)), str(tmp_path / "wide.pth"), who="student")
    # As kd-det pretrain writes it, and Detectron2 matches it by the ends of names.
    save_backbone(str(tmp_path / "wide.pkl"), backbone_weights(build_model(tiny_cfg(width=8))), {})
    with pytest.raises(ValueError, match=rf"has 12: 12 misshapen \({stem} and 11 more\)\. "):
        check_initial_weights(build_model(tiny_cfg(width=4)), str(tmp_path / "wide.pkl"), who="student")


def test_weights_that_do_not_exist_or_are_damaged(tmp_path):
    model = build_model(tiny_cfg())
    with pytest.raises(FileNotFoundError, match="The weights of the student do not exist"):
        check_initial_weights(model, str(tmp_path / "no.pth"), who="student")
    (tmp_path / "bad.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad.pth \(0 bytes\) is truncated or not a checkpoint"):
        check_initial_weights(model, str(tmp_path / "bad.pth"), who="student")


def test_truncated_weights_that_torch_seeks_in_vain(tmp_path):
    """Above some 4 KB, torch raises an OSError without a file's name."""
    model = build_model(tiny_cfg())
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    os.truncate(tmp_path / "w.pth", 20_000)
    with pytest.raises(ValueError, match=r"w.pth \(20,000 bytes\) is truncated or not a checkpoint"):
        load_strictly(model, str(tmp_path / "w.pth"), who="student")


def test_misshapen_weights_are_not_also_missing(tmp_path):
    torch.save({"model": build_model(tiny_cfg()).state_dict()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"do not fit the student: 4 misshapen \([^;]*$"):
        load_strictly(build_model(tiny_cfg(MODEL__ROI_HEADS__NUM_CLASSES=5)), str(tmp_path / "w.pth"), who="student")
