"""``kd_det.distill`` does what the command does, in the user's process, and leaves it as it was."""

import logging
import os
import signal

import numpy as np
import pytest
import torch
from detectron2.utils.logger import setup_logger

import kd_det
from kd_det.cli import train
from kd_det.engine import Trainer
from kd_det.errors import UserError
from kd_det.visualization.history import read_history
from tests.tiny_run import run_cfg


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with student.yaml, a plain student that is evaluated after its two steps, and a teacher."""
    monkeypatch.chdir(tmp_path)
    cfg = run_cfg(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS=(), MODEL__META_ARCHITECTURE="GeneralizedRCNN")
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = cfg.DATASETS.TRAIN, "out"
    # An untrained student finds something.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    (tmp_path / "student.yaml").write_text(cfg.dump())
    return {"teacher": cfg.KD.TEACHER.CONFIG_FILE, "teacher_weights": cfg.KD.TEACHER.WEIGHTS}


def evaluated(folder) -> dict[str, float]:
    """The numbers of the last evaluation in metrics.json."""
    return {key: value for key, value in read_history(folder).last().items() if key.startswith("bbox/")}


def test_two_calls_in_a_process_and_the_command(files, capsys):
    own = logging.getLogger("kd_det").handlers
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = kd_det.distill("student.yaml", **files, output="first")
    text = capsys.readouterr().out
    second = kd_det.distill("student.yaml", **files, output="second", opts={"SOLVER.STEPS": (), "SEED": 7})
    again = capsys.readouterr().out
    assert torch.equal(torch.rand(3), expected) and logging.getLogger("kd_det").handlers is own
    for out, folder in ((text, "first"), (again, "second")):
        assert out.count("Starting training from iteration 0") == out.count("student <- teacher") == 1
        assert open(f"{folder}/log.txt").read().count("Starting training from iteration 0") == 1
        assert f"kd-det export --config-file {folder}/config.yaml --weights {folder}/model_final.pth" in out
    train.main(["--config-file", "student.yaml", "--teacher", files["teacher"], "--teacher-weights",
                files["teacher_weights"], "OUTPUT_DIR", "command"])  # fmt: skip
    for folder in ("first", "second", "command"):
        found = evaluated(folder)
        assert len(found) >= 4
        for results in (first, second):
            np.testing.assert_equal({key: results["bbox"][key.partition("/")[2]] for key in found}, found)
    weights = [torch.load(f"{folder}/model_final.pth")["model"] for folder in ("first", "second", "command")]
    assert all(torch.equal(value, other[key]) for other in weights[1:] for key, value in weights[0].items())

    # Resumed after its end, it evaluates again; replaced, it has a log of its own.
    assert kd_det.distill("student.yaml", **files, output="first", resume=True).keys() == {"bbox"}
    kd_det.distill("student.yaml", **files, losses=["PKD"], output="first", overwrite=True)
    log = open("first/log.txt").read()
    assert log.count("Starting training") == 1 and "pkd" in log and "--losses PKD" in log


def test_errors_are_raised(files):
    handlers = list(logging.getLogger("detectron2").handlers)
    for options, message in (
        ({"teacher": "nowhere.yaml"}, "nowhere.yaml"),
        ({"opts": {"SOLVER.BASE_LRR": 1}}, "Did you mean 'SOLVER.BASE_LR'"),
        ({"opts": ["SOLVER.BASE_LR"]}, "expected KEY VALUE pairs"),
        ({"num_gpus": 0}, "--num-gpus and --num-machines must be at least 1, found 0"),
        ({"losses": ["NTS"]}, "Did you mean 'NST'"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            kd_det.distill("student.yaml", **{**files, **options}, output="out")
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        kd_det.distill("nowhere.yaml")
    assert not os.path.exists("out") and logging.getLogger("detectron2").handlers == handlers


def test_a_request_to_stop_saves_and_does_not_exit(files, monkeypatch):
    step = Trainer.run_step

    def stopped(self):
        step(self)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "run_step", stopped)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="all is saved, continue with resume=True"):
        kd_det.distill("student.yaml", **files)
    assert os.path.isfile("out/model_0000000.pth") and signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(Trainer, "run_step", step)
    with pytest.raises(UserError, match="continue it with --resume"):
        kd_det.distill("student.yaml", **files)
    assert kd_det.distill("student.yaml", **files, resume=True)["bbox"]


@pytest.mark.slow
def test_two_processes(files, tmp_path):
    (tmp_path / "data.py").write_text(
        "import tests.tiny\nfrom detectron2.data.datasets import register_coco_instances\n"
        f"register_coco_instances('two', {{}}, '{tmp_path}/images/annotations.json', '{tmp_path}/images')\n"
    )
    opts = {"DATASETS.TRAIN": ("two",), "DATASETS.TEST": ("two",)}
    results = kd_det.distill("student.yaml", **files, opts=opts, imports=["data.py"], num_gpus=2)
    found = evaluated("out")
    np.testing.assert_equal({key: results["bbox"][key.partition("/")[2]] for key in found}, found)
    (tmp_path / "broken.py").write_text("import multiprocessing as m\nassert not m.parent_process(), 'no'\n")
    with pytest.raises(RuntimeError, match="exit status 1"):
        kd_det.distill("student.yaml", **files, opts=opts, imports=["data.py", "broken.py"], num_gpus=2, overwrite=True)


def test_a_users_own_logger_is_left_alone(files, capsys):
    setup_logger.cache_clear()
    setup_logger()
    handlers = list(logging.getLogger("detectron2").handlers)
    capsys.readouterr()
    kd_det.distill("student.yaml", **files)
    assert capsys.readouterr().out.count("Starting training from iteration 0") == 1
    assert logging.getLogger("detectron2").handlers == handlers
    logging.getLogger("detectron2").handlers.clear()
