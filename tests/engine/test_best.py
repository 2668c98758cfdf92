"""``model_best.pth`` is the student that was evaluated best, also after a kill, and with an average of the weights."""

import os

import pytest
import torch

from kd_det import student_cfg
from kd_det.engine import Trainer, evaluate
from kd_det.weights.checkpoint import SafeCheckpointer
from tests.tiny_run import differing, run_cfg, train

# By the iteration of the evaluation; the last one follows the last step.
VALUES = {1: 10.0, 3: 30.0, 5: 20.0, 6: float("nan")}


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


class Scored(Trainer):
    """Evaluations give VALUES, and remember what was evaluated."""

    values = VALUES
    evaluated: dict = {}
    ends_at = -1

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {}

    def _evaluate(self):
        trainer = self

        class Tester:
            @staticmethod
            def test(cfg, model):
                iteration = min(trainer.iter, trainer.max_iter - 1)
                trainer.evaluated[iteration] = {k: v.clone() for k, v in model.student.state_dict().items()}
                return {"bbox": {"AP": trainer.values[iteration], "AP50": -trainer.values[iteration]}}

        type(self)._tester = Tester
        return super()._evaluate()

    def run_step(self):
        if self.iter == self.ends_at:
            raise KeyboardInterrupt
        super().run_step()


def cfg_of(tmp_path, **opts):
    return run_cfg(tmp_path, "NST", SOLVER__MAX_ITER=7, TEST__EVAL_PERIOD=2, **opts)


def best(cfg) -> dict:
    return torch.load(f"{cfg.OUTPUT_DIR}/model_best.pth", weights_only=True)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_it_holds_what_was_evaluated_best(tmp_path, decay):
    cfg = cfg_of(tmp_path, KD__EMA_DECAY=decay)
    trainer = train(cfg, trainer_class=Scored)
    found = best(cfg)
    assert (found["metric"], found["value"], found["iteration"]) == ("bbox/AP", 30.0, 3)
    assert not differing(found["model"], Scored.evaluated[3])
    # It is a plain student, and not where a run continues.
    plain = student_cfg(cfg).clone()
    plain.defrost()
    plain.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_best.pth"
    evaluate(plain, Scored)
    checkpointer = SafeCheckpointer(trainer.model, cfg.OUTPUT_DIR)
    assert checkpointer.get_checkpoint_file().endswith("model_final.pth")


def test_another_metric(tmp_path, caplog):
    cfg = cfg_of(tmp_path, KD__BEST_METRIC="bbox/AP50")
    train(cfg, trainer_class=Scored)
    assert (best(cfg)["value"], best(cfg)["iteration"]) == (-10.0, 1)
    caplog.set_level("WARNING")
    cfg = cfg_of(tmp_path, KD__BEST_METRIC="segm/AP", OUTPUT_DIR=str(tmp_path / "other"))
    train(cfg, trainer_class=Scored)
    assert "Unknown KD.BEST_METRIC 'segm/AP'. Valid names: bbox/AP, bbox/AP50." in caplog.text
    assert not os.path.exists(f"{cfg.OUTPUT_DIR}/model_best.pth")


@pytest.mark.parametrize("ends_at", [3, 5, 6])
def test_resumed_it_is_the_same(tmp_path, monkeypatch, ends_at):
    whole = cfg_of(tmp_path)
    train(whole, trainer_class=Scored)
    cfg = cfg_of(tmp_path, OUTPUT_DIR=str(tmp_path / "killed"))
    monkeypatch.setattr(Scored, "ends_at", ends_at)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, trainer_class=Scored)
    monkeypatch.setattr(Scored, "ends_at", -1)
    train(cfg, trainer_class=Scored, resume=True)
    assert not differing(best(whole), best(cfg))


def test_a_run_from_its_beginning_takes_nothing_over(tmp_path, monkeypatch):
    cfg = cfg_of(tmp_path)
    train(cfg, trainer_class=Scored)
    monkeypatch.setattr(Scored, "values", {key: value / 10 for key, value in VALUES.items()})
    train(cfg, trainer_class=Scored)
    assert best(cfg)["value"] == 3.0


def test_without_a_period_there_is_none(tmp_path, monkeypatch):
    cfg = cfg_of(tmp_path).clone()
    cfg.TEST.EVAL_PERIOD = 0
    train(cfg, trainer_class=Scored)
    assert not os.path.exists(f"{cfg.OUTPUT_DIR}/model_best.pth")
