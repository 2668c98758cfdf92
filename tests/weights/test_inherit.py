import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import FPN, build_model

from kd_det.weights.inherit import inherit_weights
from tests.tiny import batch, distillation_cfg, tiny_cfg, tiny_resnet
from tests.tiny_run import run_cfg

LEVELS = ["res2", "res3", "res4", "res5"]
PARTS = ("fpn", "proposal_generator", "roi_heads")


def networks():
    torch.manual_seed(1)
    return build_model(tiny_cfg()), build_model(tiny_cfg(depth=50, width=8))


def test_taken_where_name_and_shape_agree():
    student, teacher = networks()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    theirs = teacher.state_dict()
    taken, left = inherit_weights(student, teacher, PARTS)
    after = student.state_dict()
    for name, value in after.items():
        assert torch.equal(value, theirs[name] if name in taken else before[name]), name
    # Widths 4 to 32 against 8 to 64: the laterals' inputs differ, all else in the three parts is equal.
    laterals = {f"backbone.fpn_lateral{i}.{what}" for i in (2, 3, 4, 5) for what in ("weight", "bias")}
    assert set(left) == laterals
    assert left["backbone.fpn_lateral2.weight"] == "(8, 4, 1, 1) in the student, (8, 8, 1, 1) in the teacher"
    assert left["backbone.fpn_lateral2.bias"] == "another weight of its layer differs"
    wanted = {n for n in after if not n.startswith("backbone.bottom_up.")}
    assert set(taken) == wanted - laterals
    assert {"backbone.fpn_output3.bias", "roi_heads.box_predictor.cls_score.weight"} <= set(taken)


def test_parts_are_dotted_module_names_too():
    student, teacher = networks()
    taken, left = inherit_weights(student, teacher, ["roi_heads.box_predictor"])
    assert {name.rsplit(".", 2)[1] for name in taken} == {"cls_score", "bbox_pred"} and len(taken) == 4 and not left


@pytest.mark.parametrize("fpn", [8, 4])
def test_a_layer_is_inherited_whole_or_not_at_all(caplog, fpn):
    """D42: a norm's counter is no weight, and the norm of a convolution that stays random stays new."""
    student, teacher = (
        torch.nn.ModuleDict({"backbone": FPN(tiny_resnet(tiny_cfg(width=width)), LEVELS, channels, norm="BN")})
        for width, channels in ((4, fpn), (8, 8))
    )
    for norm in (m for m in teacher.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.fill_(3.0)
    with caplog.at_level(logging.INFO, logger="kd_det.weights.inherit"):
        found = inherit_weights(student, teacher, ["fpn"])
    # Four laterals and four outputs, each of a weight and its norm's weight, bias, mean and variance.
    taken = f"{len(found.taken)} of 40 weights taken"
    assert caplog.records[0].getMessage() == f"KD.INHERIT 'fpn': {taken} from the teacher."
    assert caplog.records[0].levelname == ("INFO" if found.taken else "WARNING")
    outputs = {f"fpn_output{i}" for i in (2, 3, 4, 5)}
    assert {name.split(".")[1] for name in found.taken} == (outputs if fpn == 8 else set())
    assert student.backbone.fpn_lateral2.norm.running_mean.eq(0).all()
    assert student.backbone.fpn_output2.norm.running_mean.eq(3 if fpn == 8 else 0).all()


def test_a_part_with_nothing_to_take_is_warned_about(caplog):
    student = build_model(tiny_cfg(fpn=4))
    with caplog.at_level(logging.INFO, logger="kd_det.weights.inherit"):
        inherit_weights(student, networks()[1], ["proposal_generator.rpn_head.conv"])
    messages = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert messages[0] == (
        "WARNING",
        "KD.INHERIT 'proposal_generator.rpn_head.conv': 0 of 2 weights taken from the teacher.",
    )
    bias = "Not inherited: proposal_generator.rpn_head.conv.bias ((4,) in the student, (8,) in the teacher)"
    assert messages[2] == ("INFO", bias)


def test_unknown_parts_name_the_valid_ones():
    student, teacher = networks()
    with pytest.raises(ValueError, match="part of the student in KD.INHERIT 'roi_head'. Did you mean 'roi_heads'"):
        inherit_weights(student, teacher, ["roi_head"])
    with pytest.raises(ValueError, match="part of the teacher in KD.INHERIT 'fpn'.*Valid names: layer"):
        inherit_weights(student, torch.nn.ModuleDict({"layer": torch.nn.Linear(1, 1)}), ["fpn"])


@pytest.mark.parametrize("losses", [(), ("NSTLoss",)])
def test_the_config_key_with_and_without_losses(tmp_path, losses):
    cfg = distillation_cfg(tmp_path, *losses, KD__INHERIT=PARTS)
    teacher = torch.load(tmp_path / "teacher.pth")["model"]
    model = build_model(cfg).train()
    for name in ("proposal_generator.rpn_head.conv.weight", "backbone.fpn_output5.weight"):
        assert torch.equal(model.state_dict()[name], teacher[name])
    assert ("loss_nst" in model(batch())) == bool(losses)


def test_what_is_not_inherited_starts_as_without(tmp_path):
    plain = distillation_cfg(tmp_path, KD__INHERIT=())
    states = []
    for parts in ((), ("proposal_generator",)):
        plain.KD.INHERIT = parts
        torch.manual_seed(7)
        states.append((build_model(plain).state_dict(), torch.rand(1)))
    (without, draw), (inherited, draw2) = states
    assert draw == draw2
    for name in (n for n in without if n.endswith("weight") and not (".norm" in n or n.startswith("losses"))):
        assert torch.equal(without[name], inherited[name]) == (not name.startswith("proposal_generator")), name


def test_the_tools_log_says_what_was_inherited(tmp_path):
    cfg = run_cfg(tmp_path, "NST", KD__INHERIT=("fpn",), SOLVER__MAX_ITER=1)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    tool = str(Path(__file__).parents[1] / "tiny_train_net.py")
    env = {**os.environ, "TINY_DATA": str(tmp_path / "images")}
    subprocess.run(
        [sys.executable, "-W", "ignore", tool, "--config-file", str(tmp_path / "run.yaml")], env=env, check=True
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("KD.INHERIT 'fpn': 8 of 16 weights taken from the teacher.") == 1
    assert "Not inherited: backbone.fpn_lateral2.weight ((8, 4, 1, 1) in the student" in log
    assert f"parameters from {tmp_path / 'teacher.pth'}" in log
