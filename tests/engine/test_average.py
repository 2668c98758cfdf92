"""A detector's training keeps an average of the student's weights (KD.EMA_DECAY)."""

import os

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from kd_det import student_cfg
from kd_det.engine import Trainer
from tests.engine.test_distributed import on_two_ranks
from tests.engine.test_resume import load, resume_from
from tests.tiny_run import differing, run_cfg, train


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


def test_a_resumed_run_ends_with_the_same_average(tmp_path):
    cfg = run_cfg(tmp_path, "NST", "Hint", KD__EMA_DECAY=0.9)
    train(cfg)
    whole = load(cfg.OUTPUT_DIR)
    assert whole["ema"]["updates"] == 6
    resumed = resume_from(cfg, "model_0000003.pth", "resumed")
    train(resumed, resume=True)
    assert differing(load(resumed.OUTPUT_DIR), whole) == []
    assert differing(load(resumed.OUTPUT_DIR, "model_ema.pth"), load(cfg.OUTPUT_DIR, "model_ema.pth")) == []


def test_it_follows_the_formula_from_the_loaded_weights_and_changes_no_training(tmp_path):
    plain = run_cfg(tmp_path, "NST", SOLVER__CHECKPOINT_PERIOD=1, SOLVER__MAX_ITER=4)
    plain.OUTPUT_DIR = str(tmp_path / "plain")
    start = build_model(student_cfg(plain)).state_dict()
    torch.save({"model": start}, tmp_path / "start.pth")
    plain.MODEL.WEIGHTS = str(tmp_path / "start.pth")
    cfg = plain.clone()
    cfg.merge_from_list(["KD.EMA_DECAY", 0.2, "OUTPUT_DIR", str(tmp_path / "out")])
    train(plain), train(cfg)
    assert differing(load(cfg.OUTPUT_DIR)["model"], load(plain.OUTPUT_DIR)["model"]) == []
    for key in ("backbone.fpn_output3.weight", "backbone.bottom_up.res3.0.conv1.norm.running_var"):
        expected = start[key].double()
        for n, name in enumerate(("model_0000000", "model_0000001", "model_0000002", "model_final"), start=1):
            decay = min(0.2, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * load(cfg.OUTPUT_DIR, f"{name}.pth")["model"][key]
        torch.testing.assert_close(load(cfg.OUTPUT_DIR, "model_ema.pth")["model"][key], expected.float())


def test_what_is_evaluated_is_the_file_that_plain_detectron2_loads(tmp_path):
    cfg = run_cfg(tmp_path, "NST", KD__EMA_DECAY=0.5, SOLVER__MAX_ITER=4)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    seen = []

    class Seen(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            seen.append({key: value.clone() for key, value in model.state_dict().items()})
            return {}

    train(cfg, trainer_class=Seen)
    plain = build_model(student_cfg(cfg))
    DetectionCheckpointer(plain).load(os.path.join(cfg.OUTPUT_DIR, "model_ema.pth"))
    found = plain.state_dict()
    assert all(torch.equal(found[key], value) for key, value in seen[-1].items())
    key = "backbone.fpn_output3.weight"
    assert not torch.equal(load(cfg.OUTPUT_DIR)["model"][key], found[key])


def test_a_skipped_step_is_no_update(tmp_path):
    cfg = run_cfg(tmp_path, "NST", KD__EMA_DECAY=0.5, KD__NON_FINITE="skip", SOLVER__MAX_ITER=4)

    class Broken(Trainer):
        def run_step(self):
            self.model.losses["nst"].weight = float("nan") if self.iter == 1 else 20.0
            super().run_step()

    assert train(cfg, trainer_class=Broken).average.updates == 3


def _averages(cfg):
    return train(cfg).average.state_dict()["averages"]


def test_two_ranks_keep_one_average(tmp_path):
    first, second = on_two_ranks(tmp_path, _averages, run_cfg(tmp_path, "NST", KD__EMA_DECAY=0.5, SOLVER__MAX_ITER=4))
    assert all(torch.equal(value, second[key]) for key, value in first.items())  # of batch-norm statistics, too
