"""kd_det inside somebody else's project: shop/ has its own mapper, backbone, ROI heads and config keys."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.datasets.miniature import write_coco

ROOT = Path(__file__).parents[2]

MAKE_TEACHER = """
import torch
from lazy_config import shop_detector
torch.manual_seed(3)
torch.save({"model": shop_detector("teacher.yaml").state_dict()}, "teacher.pth")
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A copy of the project with data and a teacher."""
    folder = tmp_path_factory.mktemp("projects") / "shop"
    shutil.copytree(Path(__file__).parent / "shop", folder)
    write_coco(folder / "datasets")
    run(folder, "-c", MAKE_TEACHER)
    return folder


def run(folder: Path, *arguments: str, expected_status: int = 0) -> str:
    # Detectron2 must stay the one that the tests run on, and the project's modules must be found from a tool too.
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(folder)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(folder / "datasets")}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == expected_status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr if expected_status else done.stdout


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_default_trainer(shop):
    out = run(shop, "train_default.py", "--config-file", "distill.yaml", "OUTPUT_DIR", "output")
    assert "RESULTS ['AP', 'AP-airplane']" in out
    last = [m for m in metrics(shop / "output") if "loss_nst" in m][-1]
    # The project's own loss, Detectron2's, and three of kd_det.
    assert all(last[f"loss_{n}"] > 0 for n in ("count", "rpn_cls", "cls", "nst", "overhaul", "soft_target"))

    checkpoint = torch.load(shop / "output/model_final.pth", weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["model"]} == {"backbone", "proposal_generator", "roi_heads"}
    deployed = run(shop, "deploy.py", "output/model_final.pth")
    assert "DETECTIONS" in deployed


@pytest.mark.slow
def test_a_run_of_default_trainer_resumes(shop):
    """Connectors and margins are those of the checkpoint, and nothing is calibrated again."""
    common = ("train_default.py", "--config-file", "distill.yaml", "--resume", "OUTPUT_DIR", "resumed")
    assert "Calibrated" in run(shop, *common)
    resumed = run(shop, *common, "SOLVER.MAX_ITER", "4")
    assert "Starting training from iteration 3" in resumed and "Calibrated" not in resumed


@pytest.mark.slow
def test_without_losses_the_run_is_the_projects_own(shop):
    options = ("SEED", "5", "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0")
    for name, extra in (
        ("config.yaml", ("OUTPUT_DIR", "own")),
        ("distill.yaml", ("OUTPUT_DIR", "off", "KD.LOSSES", "()")),
    ):
        run(shop, "train_plain.py", "--config-file", name, *options, *extra)
    own, off = (torch.load(shop / f / "model_final.pth", weights_only=True)["model"] for f in ("own", "off"))
    assert own.keys() == off.keys() and all(torch.equal(own[key], off[key]) for key in own)


def test_plain_loop(shop):
    run(shop, "train_plain.py", "--config-file", "distill.yaml", "OUTPUT_DIR", "plain")
    last = metrics(shop / "plain")[-1]
    assert last["loss_nst"] > 0 and last["loss_soft_target"] > 0
    checkpoint = torch.load(shop / "plain/model_final.pth", weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["model"]} == {"backbone", "proposal_generator", "roi_heads"}


def test_lazy_config(shop):
    tool = str(ROOT / "tools/lazyconfig_train_net.py")
    run(shop, tool, "--config-file", "lazy_config.py")
    last = [m for m in metrics(shop / "output_lazy") if "loss_nst" in m][-1]
    assert last["loss_hint"] > 0 and last["loss_count"] > 0
    # Evaluation reads the student alone.
    (shop / "teacher.pth").rename(shop / "gone.pth")
    try:
        final = "train.init_checkpoint=output_lazy/model_final.pth"
        out = run(shop, tool, "--config-file", "lazy_config.py", "--eval-only", final)
    finally:
        (shop / "gone.pth").rename(shop / "teacher.pth")
    assert "Evaluation results for bbox" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights,message",
    [
        ("", "train.init_checkpoint is empty"),
        ("no.pth", "do not exist: 'no.pth'"),
        ("teacher.pth", "do not fit the student"),
    ],
)
def test_lazy_evaluation_wants_the_students_weights(shop, weights, message):
    tool = str(ROOT / "tools/lazyconfig_train_net.py")
    options = ("--config-file", "lazy_config.py", "--eval-only", f"train.init_checkpoint={weights}")
    assert message in run(shop, tool, *options, expected_status=1)
