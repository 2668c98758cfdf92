"""A run that was stopped, anywhere and in any way, goes on as if it had not been."""

import os
import random
import signal
import time

import pytest
import torch

import kd_det.checkpoint
from kd_det.engine import RESUMABLE
from tests.tiny_run import ALL_LOSSES, differing, in_process, run_cfg, train


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


def load(folder, name="model_final.pth") -> dict:
    return torch.load(os.path.join(folder, name), weights_only=True)


def other_folder(cfg, name: str):
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = os.path.join(os.path.dirname(cfg.OUTPUT_DIR), name)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return cfg


def resume_from(cfg, name: str, folder: str):
    """The config of a run in another folder whose only checkpoint is one of this run's."""
    resumed = other_folder(cfg, folder)
    torch.save(load(cfg.OUTPUT_DIR, name), os.path.join(resumed.OUTPUT_DIR, name))
    with open(os.path.join(resumed.OUTPUT_DIR, "last_checkpoint"), "w") as file:
        file.write(name)
    return resumed


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    cfg = run_cfg(tmp_path, *ALL_LOSSES, KD__WARMUP_ITERS=4, KD__NST__STOP_ITER=5)
    train(cfg)
    before = load(cfg.OUTPUT_DIR)
    assert any(key.startswith("overhaul") for key in before["model"]._metadata["kd_det.losses"])
    for name in ("model_0000001.pth", "model_0000003.pth"):
        assert differing(load(cfg.OUTPUT_DIR, name), before)  # training did go on from there
        resumed = resume_from(cfg, name, f"from_{name}")
        train(resumed, resume=True)
        assert differing(load(resumed.OUTPUT_DIR), before) == []


def test_the_number_of_workers_and_evaluations_change_nothing(tmp_path):
    cfg = run_cfg(tmp_path, "NST")
    train(cfg)
    other = other_folder(cfg, "workers")
    other.DATALOADER.NUM_WORKERS = 2
    other.DATASETS.TEST = other.DATASETS.TRAIN
    other.TEST.EVAL_PERIOD = 2
    train(other)
    assert differing(load(other.OUTPUT_DIR), load(cfg.OUTPUT_DIR)) == []
    resumed = resume_from(other, "model_0000003.pth", "resumed")
    train(resumed, resume=True)
    assert differing(load(resumed.OUTPUT_DIR), load(cfg.OUTPUT_DIR)) == []


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_every_sampler_resumes(tmp_path, sampler):
    cfg = run_cfg(tmp_path, DATALOADER__SAMPLER_TRAIN=sampler, DATALOADER__REPEAT_THRESHOLD=0.9)
    cfg.SEED = -1  # nothing but the checkpoint knows the order
    train(cfg)
    resumed = resume_from(cfg, "model_0000001.pth", "resumed")
    train(resumed, resume=True)
    assert differing(load(resumed.OUTPUT_DIR), load(cfg.OUTPUT_DIR)) == []


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    cfg = run_cfg(tmp_path, "NST")
    train(cfg)
    before = load(cfg.OUTPUT_DIR)
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == cfg.SOLVER.MAX_ITER
    assert differing(load(cfg.OUTPUT_DIR), before) == []


def test_resuming_with_other_losses_says_so(tmp_path):
    cfg = run_cfg(tmp_path, "Hint")
    train(cfg)
    cfg.KD.LOSSES = ("NST",)
    with pytest.raises(ValueError, match="of a run with other losses or another model"):
        train(cfg, resume=True)


def kill_at_random(cfg, moment: float):
    """Run until killed: at a moment of a random step's course, or inside a save."""
    rng = random.Random(moment)
    if rng.random() < 0.4:
        written = os.replace if rng.random() < 0.5 else None
        victim = rng.randrange(1, 7)
        calls = iter(range(1, 100))

        def replace(source, target):
            if next(calls) == victim:
                if written:  # the file has its name, last_checkpoint has not moved
                    written(source, target)
                os.kill(os.getpid(), signal.SIGKILL)
            os.rename(source, target)

        kd_det.checkpoint.os = _Replaced(os, replace)
    else:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, 0.05 + rng.random() * 1.5)
    train(cfg, resume=True)


class _Replaced:
    """The module os with another ``replace``."""

    def __init__(self, module, replace):
        self._module, self.replace = module, replace

    def __getattr__(self, name):
        return getattr(self._module, name)


def kill_until_done(cfg, kills: int) -> int:
    killed = 0
    for attempt in range(kills):
        status = in_process(kill_at_random, cfg, float(attempt))
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
    assert in_process(train_and_exit, cfg) == 0
    return killed


def train_and_exit(cfg):
    train(cfg, resume=True)


def check_kills(tmp_path, kills: int):
    cfg = run_cfg(tmp_path, *ALL_LOSSES, SOLVER__CHECKPOINT_PERIOD=1, SOLVER__MAX_ITER=12)
    train(cfg)
    before = load(cfg.OUTPUT_DIR)
    killed = kill_until_done(other_folder(cfg, "killed"), kills)
    assert killed >= kills // 3  # later ones may find the run finished
    assert differing(load(os.path.join(tmp_path, "killed")), before) == []


def test_killed_at_10_random_moments(tmp_path):
    check_kills(tmp_path, 10)


@pytest.mark.slow
def test_killed_at_50_random_moments(tmp_path):
    for run in range(5):
        check_kills(tmp_path / str(run), 10)


def terminate_soon(cfg, signum, step):
    """Run, and be asked to stop in the middle of a step."""
    from kd_det.engine import Trainer

    class Asked(Trainer):
        def run_step(self):
            if self.iter == step:
                os.kill(os.getpid(), signum)
            super().run_step()

    train(cfg, trainer_class=Asked)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_the_step_and_saves(tmp_path, signum):
    cfg = run_cfg(tmp_path, "Overhaul")
    train(cfg)
    stopped = other_folder(cfg, "stopped")
    assert in_process(terminate_soon, stopped, signum, 2) == RESUMABLE == 75
    assert open(os.path.join(stopped.OUTPUT_DIR, "last_checkpoint")).read() == "model_0000002.pth"
    train(stopped, resume=True)
    assert differing(load(stopped.OUTPUT_DIR), load(cfg.OUTPUT_DIR)) == []


def test_asked_to_stop_in_an_evaluation_it_ends_at_once(tmp_path):
    cfg = run_cfg(tmp_path, TEST__EVAL_PERIOD=2)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    assert in_process(stopped_in_evaluation, cfg) == RESUMABLE
    assert open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")).read() == "model_0000001.pth"


def stopped_in_evaluation(cfg):
    from kd_det.engine import Trainer

    class Asked(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            raise AssertionError("it went on")

    train(cfg, trainer_class=Asked)
