"""The trainer, the command line and what they share with Detectron2's."""

import json
import os
import re

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import build_model

from kd_det import student_cfg
from kd_det.cli import add_teacher, argument_parser, check_run, load_config, parse_arguments
from kd_det.engine import Trainer, evaluate
from kd_det.engine.step import MOST_SKIPPED_IN_A_ROW
from tests.tiny import distillation_cfg, tiny_cfg
from tests.tiny_run import differing, run_cfg, train


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


def load(cfg, name="model_final.pth") -> dict:
    return torch.load(os.path.join(cfg.OUTPUT_DIR, name), weights_only=True)


def metrics(cfg) -> list[dict]:
    with open(os.path.join(cfg.OUTPUT_DIR, "metrics.json")) as file:
        return [json.loads(line) for line in file]


def arguments(tmp_path, cfg, *argv: str):
    (tmp_path / "run.yaml").write_text(cfg.dump())
    return parse_arguments(argument_parser(), ["--config-file", str(tmp_path / "run.yaml"), *argv])


# Training.


def test_a_run_logs_each_loss_and_evaluates_the_student(tmp_path):
    cfg = run_cfg(tmp_path, "NST", "SoftTarget")
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    train(cfg)
    logged = {key for line in metrics(cfg) for key in line}
    assert {"loss_nst", "loss_soft_target", "loss_cls", "total_loss", "lr", "eta_seconds", "bbox/AP"} <= logged
    assert any(name.startswith("events.out") for name in os.listdir(cfg.OUTPUT_DIR))
    # The checkpoint is the plain student.
    plain = build_model(student_cfg(cfg))
    plain.load_state_dict(load(cfg)["model"], strict=True)


def test_without_losses_it_trains_as_the_plain_student(tmp_path):
    cfg = run_cfg(tmp_path)
    train(cfg)
    plain = student_cfg(cfg)
    plain.defrost()
    plain.OUTPUT_DIR = str(tmp_path / "plain")
    train(plain)
    assert differing(load(cfg), load(plain)) == []


def test_evaluation_reads_no_teacher(tmp_path):
    cfg = run_cfg(tmp_path, "NST", "SoftTarget")
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    trainer = train(cfg)
    os.remove(cfg.KD.TEACHER.WEIGHTS)
    args = arguments(tmp_path, cfg, "--eval-only", "MODEL.WEIGHTS", os.path.join(cfg.OUTPUT_DIR, "model_final.pth"))
    alone = load_config(args)
    assert "KD" not in alone and alone.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    check_run(alone, args)
    found = evaluate(alone)["bbox"]
    during = trainer._last_eval_results["bbox"]
    assert {k: v for k, v in found.items() if v == v} == {k: v for k, v in during.items() if v == v}


def test_evaluation_of_the_latest_checkpoint(tmp_path):
    cfg = run_cfg(tmp_path)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    train(cfg)
    args = arguments(tmp_path, cfg, "--eval-only", "--resume")
    check_run(load_config(args), args)
    assert evaluate(load_config(args), resume=True)["bbox"].keys() >= {"AP", "AP50"}


def test_evaluators_follow_the_metadata(tmp_path):
    cfg = run_cfg(tmp_path)
    assert isinstance(Trainer.build_evaluator(cfg, "tiny"), COCOEvaluator)
    assert isinstance(Trainer.build_evaluator(cfg, "voc_2007_val"), PascalVOCDetectionEvaluator)
    MetadataCatalog.get("engine_other").evaluator_type = "other"
    with pytest.raises(ValueError, match="Unknown evaluator_type 'other'.*coco, pascal_voc"):
        Trainer.build_evaluator(cfg, "engine_other")


# Losses that are not finite.


class Broken(Trainer):
    """Some steps' RPN loss is not a number."""

    steps: tuple = (2,)

    def run_step(self):
        model = self.model
        student = getattr(model, "student", model)
        handle = student.proposal_generator.register_forward_hook(self._break)
        try:
            super().run_step()
        finally:
            handle.remove()

    def _break(self, module, args, output):
        proposals, losses = output
        if self.iter in self.steps:
            losses = {**losses, "loss_rpn_loc": losses["loss_rpn_loc"] * float("nan")}
        return proposals, losses


def test_a_non_finite_loss_stops_the_run_and_says_where(tmp_path):
    cfg = run_cfg(tmp_path, "NST")
    with pytest.raises(FloatingPointError) as e:
        train(cfg, trainer_class=Broken)
    message = str(e.value)
    assert "iteration 2: the losses are not finite: loss_rpn_loc is nan." in message
    dump = torch.load(os.path.join(cfg.OUTPUT_DIR, "non_finite", "iter_0000002_rank_0.pth"), weights_only=True)
    assert dump["iteration"] == 2 and dump["losses"]["loss_rpn_loc"].isnan()
    for image in dump["batch"]:
        assert image["file_name"] in message
        assert image["image"].dtype == torch.uint8 and image["instances"]["gt_boxes"].shape == (3, 4)
    assert load(cfg, "model_0000001.pth")["iteration"] == 1  # what was before is there to go on from


def test_a_non_finite_distillation_loss_is_named(tmp_path):
    cfg = run_cfg(tmp_path, "NST", "Hint")

    class BrokenHint(Trainer):
        def run_step(self):
            with torch.no_grad():
                self.model.losses["hint"].connectors[0].weight.fill_(float("inf"))
            super().run_step()

    with pytest.raises(FloatingPointError, match="iteration 0: .*loss_hint.*Images: .*png"):
        train(cfg, trainer_class=BrokenHint)


def test_a_non_finite_step_is_skipped_and_counted(tmp_path):
    cfg = run_cfg(tmp_path, "Overhaul", KD__NON_FINITE="skip", SOLVER__CHECKPOINT_PERIOD=1)
    trainer = train(cfg, trainer_class=Broken)
    assert trainer._trainer.non_finite_steps == 1
    assert [line["non_finite_steps"] for line in metrics(cfg) if "non_finite_steps" in line]
    before, after = load(cfg, "model_0000001.pth"), load(cfg, "model_0000002.pth")
    # Weights, batch norm's statistics, margins, connectors and momentum are as they were; the step counts.
    assert differing(before["model"], after["model"]) == []
    momentum = [c["trainer"]["_trainer"]["optimizer"]["state"] for c in (before, after)]
    assert differing(*momentum) == []
    final = load(cfg)
    assert all(value.isfinite().all() for value in final["model"].values() if value.is_floating_point())
    assert differing(load(cfg, "model_0000003.pth")["model"], load(cfg, "model_0000002.pth")["model"])


class BrokenGradient(Trainer):
    """In step 2 a finite loss has a gradient that is not: that of sqrt at 0, say."""

    def run_step(self):
        weight = self.model.student.backbone.fpn_output2.weight
        handle = weight.register_hook(lambda gradient: gradient * (float("inf") if self.iter == 2 else 1.0))
        super().run_step()
        handle.remove()


def test_a_non_finite_gradient_never_reaches_the_weights(tmp_path):
    cfg = run_cfg(tmp_path, "NST", SOLVER__CHECKPOINT_PERIOD=1)
    with pytest.raises(FloatingPointError) as e:
        train(cfg, trainer_class=BrokenGradient)
    expected = "iteration 2: the losses are finite, the gradients of backbone.fpn_output2.weight are not."
    assert expected in str(e.value)
    cfg.KD.NON_FINITE = "skip"
    cfg.OUTPUT_DIR = str(tmp_path / "skipping")
    assert train(cfg, trainer_class=BrokenGradient)._trainer.non_finite_steps == 1
    assert differing(load(cfg, "model_0000001.pth")["model"], load(cfg, "model_0000002.pth")["model"]) == []
    assert all(value.isfinite().all() for value in load(cfg)["model"].values())


def test_a_run_that_only_skips_ends(tmp_path):
    cfg = run_cfg(tmp_path, KD__NON_FINITE="skip", SOLVER__MAX_ITER=500)

    class AllBroken(Broken):
        steps = range(500)

    with pytest.raises(FloatingPointError, match=f"Skipped {MOST_SKIPPED_IN_A_ROW} steps in a row: training diverged"):
        train(cfg, trainer_class=AllBroken)


def test_an_unknown_way_of_treating_them_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown KD.NON_FINITE .ignore.. Valid names: stop, skip"):
        train(run_cfg(tmp_path, KD__NON_FINITE="ignore"))


class Watched(Trainer):
    """Notes in which precision the student's and the teacher's backbones ran, and that of the losses."""

    def run_step(self):
        self.found = found = set()
        forward = self.model.forward

        def forward_and_note(batch):
            losses = forward(batch)
            found.update(("loss", value.dtype) for value in losses.values())
            return losses

        self.model.forward = forward_and_note
        networks = {"student": self.model.student, "teacher": self.model.teacher}
        handles = [
            network.backbone.register_forward_hook(
                lambda module, args, output, side=side: found.update((side, x.dtype) for x in output.values())
            )
            for side, network in networks.items()
        ]
        super().run_step()
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_mixed_precision_trains_in_bfloat16_on_the_cpu(tmp_path, precision):
    # One step: later ones are of other weights. Losses on regions are left out, for scores in bfloat16 choose others.
    maps = ("NST", "Overhaul", "Hint", "AttentionTransfer")
    cfg = run_cfg(tmp_path, *maps, "SoftTarget", "Similarity", SOLVER__MAX_ITER=1, KD__AMP_PRECISION=precision)
    train(cfg)
    exact = metrics(cfg)[-1]
    cfg.SOLVER.AMP.ENABLED = True
    cfg.OUTPUT_DIR = str(tmp_path / "amp")
    trainer = train(cfg, trainer_class=Watched)
    assert {("student", torch.bfloat16), ("teacher", torch.bfloat16)} <= trainer.found
    assert ("loss", torch.bfloat16) not in trainer.found
    for name in ("nst", "overhaul", "hint", "at"):
        # bfloat16 keeps 8 bits: a map is wrong by 2^-8 of its size after each of some 20 layers, a loss by about twice.
        assert metrics(cfg)[-1][f"loss_{name}"] == pytest.approx(exact[f"loss_{name}"], rel=20 * 2 * 2**-8), name
    assert all(value.dtype != torch.bfloat16 and value.isfinite().all() for value in load(cfg)["model"].values())


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown KD.AMP_PRECISION 'half'. Valid names: float16, bfloat16"):
        train(run_cfg(tmp_path, KD__AMP_PRECISION="half"))


def test_gradients_are_scaled_and_the_scale_is_resumed(tmp_path):
    """As on a GPU in float16; here the scaler runs on the CPU."""
    cfg = run_cfg(tmp_path, "NST")
    train(cfg)

    class Scaled(Trainer):
        def __init__(self, cfg):
            super().__init__(cfg)
            self._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    scaled = cfg.clone()
    scaled.OUTPUT_DIR = str(tmp_path / "scaled")
    trainer = train(scaled, trainer_class=Scaled)
    assert trainer._trainer.grad_scaler.get_scale() == 1024 * 2**3  # doubled every other of 6 steps
    assert load(scaled)["trainer"]["_trainer"]["grad_scaler"]["scale"] == 8192
    for key, value in load(cfg)["model"].items():  # a power of 2 rounds nothing
        torch.testing.assert_close(load(scaled)["model"][key], value, rtol=1e-5, atol=1e-6)
    scaled.SOLVER.MAX_ITER = 8
    assert train(scaled, resume=True, trainer_class=Scaled)._trainer.grad_scaler.get_scale() == 1024 * 2**4


# The shortest way in.


def teacher_file(tmp_path, **opts) -> str:
    cfg = tiny_cfg(depth=50, width=8, **opts)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "t.pth")
    (tmp_path / "t.yaml").write_text(cfg.dump())
    return str(tmp_path / "t.yaml")


RETINANET = {
    "MODEL__META_ARCHITECTURE": "RetinaNet",
    "MODEL__BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL__RESNETS__OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL__RESNETS__DEPTH": 18,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
    "MODEL__FPN__IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL__RETINANET__NUM_CLASSES": 3,
}


def test_an_argument_turns_a_plain_config_into_distillation(tmp_path):
    teacher = teacher_file(tmp_path)
    cfg = tiny_cfg()
    add_teacher(cfg, teacher, weights=str(tmp_path / "t.pth"))
    assert cfg.MODEL.META_ARCHITECTURE == "Distiller" and cfg.KD.STUDENT.META_ARCHITECTURE == "GeneralizedRCNN"
    assert cfg.KD.LOSSES == ("PKD",) and cfg.KD.INHERIT == ("fpn", "proposal_generator", "roi_heads")
    assert cfg.KD.PKD.STUDENT_TAPS == ("p2", "p3", "p4", "p5")
    model = build_model(cfg)
    assert list(model.losses) == ["pkd"]
    theirs = model.teacher.roi_heads.box_predictor.cls_score.weight
    assert torch.equal(model.student.roi_heads.box_predictor.cls_score.weight, theirs)


def test_a_student_without_roi_heads_learns_on_the_shared_levels(tmp_path):
    teacher = teacher_file(tmp_path)
    cfg = tiny_cfg(**RETINANET)
    add_teacher(cfg, teacher, weights=str(tmp_path / "t.pth"))
    assert cfg.KD.LOSSES == ("PKD",) and cfg.KD.PKD.STUDENT_TAPS == ("p3", "p4", "p5")
    assert cfg.KD.INHERIT == ("fpn",)
    assert cfg.KD.STUDENT.META_ARCHITECTURE == "RetinaNet"
    build_model(cfg)


def test_from_a_teacher_of_other_classes_no_class_is_inherited(tmp_path):
    teacher = teacher_file(tmp_path)
    cfg = tiny_cfg(MODEL__ROI_HEADS__NUM_CLASSES=5)
    add_teacher(cfg, teacher, weights=str(tmp_path / "t.pth"))
    assert cfg.KD.LOSSES == ("PKD",) and cfg.KD.INHERIT == ("fpn", "proposal_generator", "roi_heads.box_head")
    build_model(cfg)


@pytest.mark.parametrize("opts, found", [([], 3), (["KD.INHERIT", "()"], 0), (["KD.INHERIT", "('fpn',)"], 1)])
def test_what_the_user_says_of_inheriting_counts(tmp_path, opts, found):
    cfg = run_cfg(tmp_path, MODEL__META_ARCHITECTURE="GeneralizedRCNN", KD__LOSSES=())
    teacher = ["--teacher", cfg.KD.TEACHER.CONFIG_FILE, "--teacher-weights", cfg.KD.TEACHER.WEIGHTS]
    args = arguments(tmp_path, cfg, *teacher, *opts)
    assert len(check_run(load_config(args), args).KD.INHERIT) == found


def test_the_users_own_keys_win(tmp_path):
    args = arguments(
        tmp_path, tiny_cfg(), "--teacher", teacher_file(tmp_path), "--teacher-weights", str(tmp_path / "t.pth"),
        "--losses", "NST,Hint", "KD.NST.STUDENT_TAPS", "('p4',)", "KD.HINT.WEIGHT", "0.5",
    )  # fmt: skip
    cfg = load_config(args)
    assert cfg.KD.LOSSES == ("NST", "Hint") and cfg.KD.NST.STUDENT_TAPS == ("p4",) and cfg.KD.HINT.WEIGHT == 0.5


def test_losses_of_a_config_that_has_a_teacher(tmp_path):
    cfg = distillation_cfg(tmp_path, "NST", "Hint")
    assert load_config(arguments(tmp_path, cfg, "--losses", "AttentionTransfer")).KD.LOSSES == ("AttentionTransfer",)
    with pytest.raises(ValueError, match="--losses needs --teacher, or a config that names a teacher"):
        load_config(arguments(tmp_path, tiny_cfg(), "--losses", "NST"))


def test_it_draws_nothing_at_random(tmp_path):
    cfg, teacher = tiny_cfg(), teacher_file(tmp_path)
    torch.manual_seed(0)
    add_teacher(cfg, teacher, weights=str(tmp_path / "t.pth"))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num-gpus", "0"], "at least 1"),
        (["--num-gpus", "two"], "invalid int value"),
        (["--num-machines", "0"], "at least 1"),
        (["--num-machines", "2", "--machine-rank", "2"], r"must be in 0\.\.1, found 2"),
        (["--machine-rank", "-1"], "must be in 0"),
        (["--num-machines", "2", "--dist-url", "auto"], "tcp://HOST:PORT"),
        (["--teacher-weights", "a.pth"], "needs --teacher"),
        (["SOLVER.MAX_ITER"], "expected KEY VALUE pairs"),
        (["SOLVER.MAX_ITER", "3", "--resume"], "expected KEY VALUE pairs"),
        (["--resume", "5"], "expected KEY VALUE pairs"),
        (["--unknown", "5"], "unrecognized|expected KEY VALUE pairs"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(capsys, argv, message):
    with pytest.raises(SystemExit) as e:
        parse_arguments(argument_parser(), argv)
    assert e.value.code == 2
    assert re.search(message, capsys.readouterr().err)
