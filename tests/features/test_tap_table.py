import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from kd_det.cli import taps as command
from kd_det.features.tap_table import TapInfo, format_taps, input_size, list_taps
from kd_det.features.taps import Taps
from tests.tiny import tiny_cfg


@pytest.mark.parametrize("depth", [18, 50])
def test_is_what_the_taps_record(depth):
    model = build_model(tiny_cfg(depth=depth, width=8, MODEL__BACKBONE__FREEZE_AT=3))
    listed = list_taps(model, (50, 96))
    taps = Taps(model, [tap.name for tap in listed])
    with taps.recording():
        model.backbone(torch.zeros(1, 3, 64, 96))
    features = taps.pop()
    assert {tap.name for tap in listed} >= {"p2", "p6", "stem", "res2", "res3.0", "res5.pre_activation", "res5.0"}
    for tap in listed:
        assert (tap.channels, *tap.size) == features[tap.name][0].shape[1:]
    strides = {tap.name: tap.stride for tap in listed}
    assert [strides[f"p{level}"] for level in range(2, 7)] == [4, 8, 16, 32, 64]
    # FREEZE_AT 3 freezes the stem, res2 and res3; the pyramid's own convolutions train at every level.
    frozen = {tap.name for tap in listed if tap.frozen}
    assert {name.split(".")[0] for name in frozen} == {"stem", "res2", "res3"}


def test_the_model_stays_where_it_is():
    model = build_model(tiny_cfg()).train()
    list_taps(model, (64, 64))
    assert model.training and all(p.device.type == "cpu" for p in model.parameters())


def test_a_backbone_that_needs_a_device():
    model = build_model(tiny_cfg())

    class NeedsADevice(nn.Identity):
        def forward(self, x):
            raise NotImplementedError("Deformable Conv is not supported on this device")

    model.backbone.bottom_up.stem = nn.Sequential(model.backbone.bottom_up.stem, NeedsADevice())
    model.backbone.bottom_up.stem.stride = 4
    with pytest.raises(ValueError, match="cannot be run without a device"):
        list_taps(model, (64, 64))


def test_input_size_is_a_test_images():
    assert input_size(tiny_cfg()) == (800, 1333)
    assert input_size(tiny_cfg(INPUT__MIN_SIZE_TEST=160, INPUT__MAX_SIZE_TEST=160)) == (160, 160)
    assert input_size(tiny_cfg(INPUT__MIN_SIZE_TEST=0)) == (800, 1333)


def test_table():
    text = format_taps([TapInfo("res2", 256, 4, (200, 336), True), TapInfo("p3", 64, 8, (100, 168), False)])
    assert text.split()[:5] == ["tap", "channels", "stride", "size", "frozen"]
    assert [line.split() for line in text.splitlines()[2:]] == [
        ["res2", "256", "4", "200x336", "yes"],
        ["p3", "64", "8", "100x168"],
    ]


def test_the_tool_reads_no_weights(tmp_path, capsys):
    """Neither the teacher's nor timm's need to be there."""
    timm = {"MODEL__BACKBONE__NAME": "build_timm_fpn_backbone", "MODEL__TIMM__NAME": "test_resnet"}
    cfg = tiny_cfg(**timm, MODEL__TIMM__WEIGHTS="nowhere.pth", MODEL__FPN__IN_FEATURES=["res2", "res3", "res4", "res5"])
    (tmp_path / "student.yaml").write_text(cfg.dump())
    (tmp_path / "teacher.yaml").write_text(tiny_cfg(depth=50).dump())
    arguments = ["--config-file", str(tmp_path / "student.yaml"), "--teacher", str(tmp_path / "teacher.yaml")]
    command.main(arguments)
    student, teacher = capsys.readouterr().out.split("teacher, for images of")
    assert "res4.0.pre_activation" in teacher
    assert "\nbackbone.bottom_up.network.layer4.0.pre_activation " in student and "\nres5.pre_activation " in student
