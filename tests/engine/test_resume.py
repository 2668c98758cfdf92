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
from kd_det import student_cfg
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
    cfg = run_cfg(tmp_path, *ALL_LOSSES, KD__WARMUP_ITERS=4, KD__NST__STOP_ITER=5, KD__HINT__DECAY="cosine")
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
    with pytest.raises(ValueError, match="of a run with other losses or another model.*without --resume.$"):
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


# Resuming with another config.


def test_a_changed_learning_rate_is_said_and_applied_on_request(tmp_path, caplog):  # D12
    cfg = run_cfg(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS=(), SOLVER__WARMUP_ITERS=0)
    train(cfg)
    changed = resume_from(cfg, "model_0000001.pth", "changed")
    changed.SOLVER.MAX_ITER, changed.SOLVER.BASE_LR, changed.SOLVER.WEIGHT_DECAY = 3, cfg.SOLVER.BASE_LR / 4, 0.5
    trainer = train(changed, resume=True)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    rates = str(cfg.SOLVER.BASE_LR), str(cfg.SOLVER.BASE_LR / 4)
    assert any("SOLVER.BASE_LR" in x and rates[0] in x and rates[1] in x for x in said)
    assert any("SOLVER.WEIGHT_DECAY" in x and "0.0001" in x and "0.5" in x for x in said)
    assert all("KD.RESUME_SOLVER" in x for x in said if "SOLVER.BASE_LR" in x)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {cfg.SOLVER.BASE_LR}

    applied = resume_from(cfg, "model_0000001.pth", "applied")
    applied.SOLVER = changed.SOLVER.clone()
    applied.KD.RESUME_SOLVER = "config"
    trainer = train(applied, resume=True)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {cfg.SOLVER.BASE_LR / 4}
    assert 0.5 in {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert trainer.start_iter == 2


def test_the_schedule_of_a_changed_learning_rate_goes_with_it(tmp_path):
    cfg = run_cfg(tmp_path, SOLVER__STEPS=(1, 4), SOLVER__GAMMA=0.1, SOLVER__WARMUP_ITERS=0, SOLVER__BASE_LR=0.01)
    train(cfg)
    applied = resume_from(cfg, "model_0000003.pth", "applied")
    applied.SOLVER.BASE_LR = 0.001
    applied.KD.RESUME_SOLVER = "config"
    rates = []

    class Noting(Trainer):
        def run_step(self):
            rates.append(self.optimizer.param_groups[0]["lr"])
            super().run_step()

    train(applied, resume=True, trainer_class=Noting)
    assert rates == pytest.approx([1e-5, 1e-5])  # both steps of the schedule are behind it


@pytest.mark.parametrize(
    "change, name, shapes",
    [
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 5}, "roi_heads.box_predictor.cls_score.weight", r"\(4, \d+\), is \(6, "),
        ({"MODEL__FPN__OUT_CHANNELS": 16}, "backbone.fpn_lateral2.weight", r"\(8, .*is \(16, "),
    ],
)
def test_resuming_with_other_shapes_names_them(tmp_path, change, name, shapes):  # D13
    plain = student_cfg(run_cfg(tmp_path, SOLVER__MAX_ITER=2))
    plain.defrost()
    train(plain)
    for key, value in change.items():
        plain.merge_from_list([key.replace("__", "."), value])
    with pytest.raises(ValueError, match=f"of a run with other losses or another model: .*{name} was {shapes}"):
        train(plain, resume=True)


def test_schedules_of_losses_are_scaled_with_the_number_of_processes(tmp_path):  # D27
    cfg = run_cfg(tmp_path, "NST", "Hint", KD__WARMUP_ITERS=100, KD__NST__STOP_ITER=900, KD__HINT__WARMUP_ITERS=0)
    cfg.KD.DECAY_START = 300
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 4, 8, 1000
    scaled = Trainer.auto_scale_workers(cfg, 2)
    assert scaled.SOLVER.MAX_ITER == 2000
    assert (scaled.KD.WARMUP_ITERS, scaled.KD.STOP_ITER, scaled.KD.DECAY_START) == (200, -1, 600)
    assert (scaled.KD.NST.WARMUP_ITERS, scaled.KD.NST.STOP_ITER) == (None, 1800)
    assert (scaled.KD.HINT.WARMUP_ITERS, cfg.KD.NST.STOP_ITER) == (0, 900)
    assert Trainer.auto_scale_workers(cfg, 4) is cfg


def test_precise_batch_norm_resumes(tmp_path):  # D34
    cfg = run_cfg(tmp_path, TEST__EVAL_PERIOD=2)
    cfg.TEST.PRECISE_BN.ENABLED, cfg.TEST.PRECISE_BN.NUM_ITER = True, 3
    cfg.SEED = -1
    train(cfg)
    resumed = resume_from(cfg, "model_0000001.pth", "resumed")
    train(resumed, resume=True)
    assert differing(load(resumed.OUTPUT_DIR), load(cfg.OUTPUT_DIR)) == []
