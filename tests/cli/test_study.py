"""kd-det study: which runs it makes of a file or of configs, and what it leaves."""

import json
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.cli import study
from kd_det.errors import UserError
from kd_det.study import parallel
from kd_det.study.run_config import used_config

CONFIGS = Path(__file__).parents[2] / "configs" / "Quickstart"
STUDENT = str(CONFIGS / "student_R_18_FPN.yaml")
DISTILLED = f"--config-file {CONFIGS / 'student_distilled.yaml'} KD.TEACHER.WEIGHTS out/teacher/seed_7/model_final.pth"
ROWS = {
    "controls": {"teacher": f"--config-file {STUDENT} SEED 7", "alone": f"--config-file {STUDENT}"},
    "methods": {"NST": f"{DISTILLED} KD.LOSSES \"('NST',)\"", "AT": f"{DISTILLED} --losses AT".replace("--losses AT", "")},
}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """In a folder of its own; instead of training, what a run writes. Its AP is 10 times its seed; the list of runs."""
    monkeypatch.chdir(tmp_path)
    seen = []

    class Ended:
        returncode = 0

        def poll(self):
            return 0

        wait = poll

    def complete_all(runs, *, jobs, finished):
        for run in runs:
            seen.append(run.name)
            folder = Path(run.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(used_config(run.cfg).dump())
            line = {"iteration": 9, "time": 0.1, "bbox/AP": 10.0 * run.cfg.SEED, "bbox/AP50": 1.0}
            (folder / "metrics.json").write_text(json.dumps(line) + "\n")
            finished(run)

    monkeypatch.setattr(study, "complete_all", complete_all)
    return seen
