"""The student's own average as its teacher."""

import copy

import pytest
import torch
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils import comm

from kd_det import Distiller, student_cfg
from kd_det.cli import argument_parser, check_run, load_config, parse_arguments, taps
from kd_det.losses import NSTLoss
from kd_det.teachers import ema_teacher
from tests.engine.test_distributed import on_two_ranks
from tests.engine.test_resume import load, resume_from
from tests.tiny import batch, distillation_cfg, tiny_cfg
from tests.tiny_run import differing, run_cfg, train

KEYS = ("backbone.fpn_output3.weight", "backbone.bottom_up.res3.0.conv1.norm.running_var")
EMA = {"KD__TEACHER__CONFIG_FILE": "ema", "KD__TEACHER__WEIGHTS": "", "KD__TEACHER__EMA_DECAY": 0.2}


def ema_cfg(tmp_path, *losses, **opts):
    return distillation_cfg(tmp_path, *losses, **{**EMA, **opts})


def steps(model, count: int):
    """Steps on one batch; the student's state before each."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    states = []
    for _ in range(count):
        states.append(copy.deepcopy(dict(model.student.state_dict())))
        torch.manual_seed(0)
        losses = model(batch())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return states, losses


def test_it_begins_as_the_student_and_follows_the_formula(tmp_path):
    model = build_model(ema_cfg(tmp_path, "NST")).train()
    model.load_state_dict(build_model(tiny_cfg()).state_dict())  # as MODEL.WEIGHTS is, after building
    states, losses = steps(model, 4)
    for key in KEYS:
        expected = states[0][key].double()
        for n, state in enumerate(states[1:], start=1):
            decay = min(0.2, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * state[key]
        torch.testing.assert_close(model.teacher.state_dict()[key], expected.float())
    assert losses["loss_nst"] > 0
    assert not model.teacher.training and not any(p.requires_grad for p in model.teacher.parameters())


def test_at_the_first_step_the_networks_differ_in_nothing_but_their_norms(tmp_path):
    cfg = ema_cfg(tmp_path, "NST", "SoftTarget", "BoundedRegression", MODEL__RESNETS__NORM="FrozenBN")
    losses = build_model(cfg).train()(batch())
    assert abs(losses["loss_nst"].item()) < 1e-6 and abs(losses["loss_soft_target"].item()) < 1e-6


def test_it_shares_the_students_batch(tmp_path):
    model = build_model(ema_cfg(tmp_path, "NST")).train()
    seen = {}
    for side, network in (("student", model.student), ("teacher", model.teacher)):
        network.backbone.register_forward_pre_hook(lambda m, args, side=side: seen.__setitem__(side, args[0]))
    model(batch())
    assert seen["student"] is seen["teacher"]


@pytest.mark.parametrize("losses", [("NST", "Hint"), ("SoftTarget", "Similarity")], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, losses):
    cfg = run_cfg(tmp_path, *losses, **EMA)
    train(cfg)
    whole = load(cfg.OUTPUT_DIR)
    average = whole["model"]._metadata["kd_det.teacher_averages"][""]
    assert average["updates"] == 6
    resumed = resume_from(cfg, "model_0000003.pth", "resumed")
    train(resumed, resume=True)
    found = load(resumed.OUTPUT_DIR)
    assert differing(found, whole) == []
    assert differing(found["model"]._metadata["kd_det.teacher_averages"][""], average) == []
    build_model(student_cfg(cfg)).load_state_dict(whole["model"], strict=True)


def test_in_a_default_trainer(tmp_path):
    trainer = DefaultTrainer(run_cfg(tmp_path, "NST", SOLVER__MAX_ITER=4, **EMA))
    before = trainer.model.teacher.state_dict()[KEYS[0]].clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.teacher.state_dict()[KEYS[0]])


def test_a_deep_copy_follows_its_own_student(tmp_path):
    model = build_model(ema_cfg(tmp_path, "NST")).train()
    steps(model, 2)
    twin = copy.deepcopy(model)
    assert twin.teacher is not model.teacher
    before = copy.deepcopy(model.teacher.state_dict())
    steps(twin, 2)
    assert all(torch.equal(before[key], value) for key, value in model.teacher.state_dict().items())
    assert not torch.equal(twin.teacher.state_dict()[KEYS[0]], before[KEYS[0]])
    steps(model, 2)
    assert all(torch.equal(twin.teacher.state_dict()[k], v) for k, v in model.teacher.state_dict().items())


def test_on_the_command_line(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(run_cfg(tmp_path, "NST").dump())
    argv = ["--config-file", str(tmp_path / "run.yaml"), "--teacher", "ema"]
    args = parse_arguments(argument_parser(), [*argv, "--losses", "SoftTarget"])
    cfg = check_run(load_config(args), args)
    assert tuple(cfg.KD.LOSSES) == ("SoftTarget",) and cfg.KD.TEACHER.CONFIG_FILE == "ema"
    taps.main(argv)
    assert "p3" in capsys.readouterr().out.split("teacher, for")[1]


def test_in_python():
    student = build_model(tiny_cfg())
    losses = [NSTLoss(student_taps=["p3"])]
    model = Distiller(student=student, teacher=ema_teacher(build_model(tiny_cfg()), 0.9), losses=losses).train()
    steps(model, 2)
    with pytest.raises(ValueError, match="needs a network built as the student is"):
        other = ema_teacher(build_model(tiny_cfg(width=8)))
        Distiller(student=student, teacher=other, losses=[NSTLoss(student_taps=["p3"])])
    with pytest.raises(ValueError, match="EMA_DECAY must be in"):
        ema_teacher(build_model(tiny_cfg()), 1.0)


@pytest.mark.parametrize(
    "opts, message",
    [
        ({"KD__TEACHER__WEIGHTS": "a.pth"}, "KD.TEACHER.WEIGHTS is not for CONFIG_FILE 'ema'"),
        ({"KD__TEACHER__OPTS": ["MODEL.RESNETS.DEPTH", 34]}, "KD.TEACHER.OPTS is not for CONFIG_FILE 'ema'"),
        ({"KD__TEACHER__EVALUATE": True}, "KD.TEACHER.EVALUATE is not for CONFIG_FILE 'ema'"),
        ({"KD__TEACHER__EMA_DECAY": 0.0}, "KD.TEACHER.EMA_DECAY must be in"),
        ({"KD__TEACHER__DTYPE": "bfloat16"}, "is kept in float32"),
        ({"KD__AUTO_WEIGHT": 0.5}, "loss_nst: the student's average begins as the student.* KD.NST.AUTO_WEIGHT to 0.0"),
        (
            {
                "KD__TEACHER__CONFIG_FILE": "",
                "KD__LOSSES": (),
                "KD__AUTO_WEIGHT": 0.5,
                "KD__TEACHERS": [{"CONFIG_FILE": "ema", "NAME": "own", "LOSSES": ["NST"]}],
            },
            "loss_nst_own: .* KD.NST.AUTO_WEIGHT .in LOSS_OPTS of the teacher 'own' in KD.TEACHERS. to 0.0",
        ),
        ({"KD__INHERIT": ("fpn",)}, "KD.INHERIT needs a trained teacher"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(tmp_path, opts, message):
    with pytest.raises(ValueError, match=message):
        build_model(ema_cfg(tmp_path, "NST", **opts))


def _teacher(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for seed in (1, 2, 3):
        model(batch(seed=seed + 10 * comm.get_rank()))  # batch norms see other images on each rank
    return dict(model.teacher.state_dict())


def test_it_is_the_same_on_two_ranks(tmp_path):
    first, second = on_two_ranks(tmp_path, _teacher, ema_cfg(tmp_path, "NST"))
    assert all(torch.equal(value, second[key]) for key, value in first.items() if "num_batches" not in key)
