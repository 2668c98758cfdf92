"""A run that was stopped, anywhere and in any way, goes on as if it had not been."""

import multiprocessing
import os
import random
import signal
import subprocess
import time

import pytest
import torch

import kd_det.weights.checkpoint
import kd_det.weights.files
from kd_det.engine import RESUMABLE, Trainer
from kd_det.engine.stopping import restartable
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


@pytest.mark.parametrize("state", [3, {"hooks": {}}])
def test_a_checkpoint_of_no_trainer_is_said(tmp_path, state):
    cfg = run_cfg(tmp_path, SOLVER__MAX_ITER=2)
    train(cfg)
    torch.save({**load(cfg.OUTPUT_DIR), "trainer": state}, os.path.join(cfg.OUTPUT_DIR, "model_final.pth"))
    with pytest.raises(ValueError, match="trainer state is not this .* The one before it is model_0000001"):
        train(cfg, resume=True)


def kill_at_random(cfg, seed: int):
    """Go on until killed: somewhere in the next steps, or inside one of the next saves."""
    rng = random.Random(seed)
    steps, delay = rng.randrange(3), rng.random() * 0.08
    if seed % 2:
        kd_det.weights.files.os = _Killing(victim=rng.randrange(1, 5), before=rng.random() < 0.5)
        delay = 10
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    class Killed(Trainer):
        def before_step(self):
            if self.iter == self.start_iter + steps:
                signal.setitimer(signal.ITIMER_REAL, delay + 1e-6)
            super().before_step()

    train(cfg, resume=True, trainer_class=Killed)


class _Killing:
    """The module os, whose ``replace`` kills in its ``victim``-th call: before or after the file has its name."""

    def __init__(self, *, victim: int, before: bool):
        self._calls, self._victim, self._before = 0, victim, before

    def __getattr__(self, name):
        return getattr(os, name)

    def replace(self, source, target):
        self._calls += 1
        if self._calls == self._victim and self._before:
            with open(source, "r+b") as file:  # as if the last bytes had not been written
                file.truncate(os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace(source, target)
        if self._calls == self._victim:
            os.kill(os.getpid(), signal.SIGKILL)


def check_kills(tmp_path, kills: int):
    cfg = run_cfg(tmp_path, *ALL_LOSSES, SOLVER__CHECKPOINT_PERIOD=1, SOLVER__MAX_ITER=2 + 3 * kills)
    train(cfg)
    killed = other_folder(cfg, "killed")
    statuses = [in_process(kill_at_random, killed, seed) for seed in range(kills)]
    assert statuses == [-signal.SIGKILL] * kills
    assert in_process(train_and_exit, killed) == 0
    assert differing(load(killed.OUTPUT_DIR), load(cfg.OUTPUT_DIR)) == []


def train_and_exit(cfg):
    train(cfg, resume=True)


def test_killed_at_10_random_moments(tmp_path):
    check_kills(tmp_path, 10)


@pytest.mark.slow
def test_killed_at_50_random_moments(tmp_path):
    check_kills(tmp_path, 50)


def terminate_soon(cfg, signum, step):
    """Run, and be asked to stop in the middle of a step."""

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


@pytest.mark.parametrize("period", [2, 5])
def test_asked_to_stop_in_an_evaluation_it_saves_and_ends_at_once(tmp_path, period):
    cfg = run_cfg(tmp_path, "NST", TEST__EVAL_PERIOD=2, SOLVER__CHECKPOINT_PERIOD=period)
    train(cfg)
    stopped = other_folder(cfg, "stopped")
    stopped.DATASETS.TEST = cfg.DATASETS.TRAIN
    assert in_process(stopped_in_evaluation, stopped) == RESUMABLE
    assert open(os.path.join(stopped.OUTPUT_DIR, "last_checkpoint")).read() == "model_0000001.pth"
    stopped.DATASETS.TEST = ()
    train(stopped, resume=True)
    assert differing(load(stopped.OUTPUT_DIR), load(cfg.OUTPUT_DIR)) == []


def stopped_in_evaluation(cfg):
    class Asked(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            for _ in range(2):  # by the launcher and by the cluster
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            raise AssertionError("it went on")

    train(cfg, trainer_class=Asked)


def test_asked_to_stop_in_a_save_it_ends_after_it(tmp_path):
    cfg = run_cfg(tmp_path, TEST__EVAL_PERIOD=2)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    assert in_process(stopped_in_a_save, cfg) == RESUMABLE
    assert open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")).read() == "model_0000001.pth"


def stopped_in_a_save(cfg):
    class Asked(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            raise AssertionError("it went on to the evaluation")

    write = kd_det.weights.checkpoint.write_aside

    def write_and_be_asked(path, content):
        os.kill(os.getpid(), signal.SIGTERM)
        write(path, content)

    kd_det.weights.checkpoint.write_aside = write_and_be_asked
    train(cfg, trainer_class=Asked)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_workers_are_asked_too_and_still_bring_the_images_of_the_step(tmp_path, signum):
    cfg = run_cfg(tmp_path, SOLVER__MAX_ITER=50)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert in_process(stopped_with_its_workers, cfg, signum) == RESUMABLE
    assert open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")).read() == "model_0000002.pth"


def stopped_with_its_workers(cfg, signum):
    class Asked(Trainer):
        def run_step(self):
            if self.iter == 2:
                workers = [str(worker.pid) for worker in multiprocessing.active_children()]
                subprocess.run(["kill", f"-{signum:d}", *workers], check=True)  # by another process
                time.sleep(0.3)  # those that would die have died
                for _ in range(20):  # more than what was prefetched
                    next(self._trainer._data_loader_iter)
                os.kill(os.getpid(), signum)
            super().run_step()

    train(cfg, trainer_class=Asked)


def test_asked_to_stop_before_training_it_can_be_restarted(tmp_path):
    for signum in (signal.SIGTERM, signal.SIGINT):
        assert in_process(asked_in_a_restartable_part, signum) == RESUMABLE


def asked_in_a_restartable_part(signum):
    with restartable():
        os.kill(os.getpid(), signum)
        time.sleep(1)
