import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import pytest
import yaml

from kd_det.cli import add_teacher, argument_parser, load_config, parse_arguments, quickstart

ROOT = Path(__file__).parents[2]


def plan(folder, *opts):
    return quickstart.Plan(Namespace(output=str(folder), opts=list(opts)), str(folder))


def test_alone_and_distilled_differ_in_the_teacher_only(tmp_path):
    planned = plan(tmp_path, "SOLVER.MAX_ITER", "7")
    alone, distilled, teacher = planned.alone(5), planned.distilled(5), planned.teacher
    at = distilled.command.index("--teacher")
    assert [x for i, x in enumerate(distilled.command[:-2]) if not at <= i < at + 6] == alone.command
    assert distilled.cfg.KD.LOSSES == ("PKD",) and distilled.command[-2] == "KD.INHERIT"
    assert distilled.command[at + 3] == teacher.weights and teacher.weights in distilled.inputs
    assert "5" == alone.command[alone.command.index("SEED") + 1]
    assert "7" == teacher.command[teacher.command.index("SOLVER.MAX_ITER") + 1]


def test_the_recipe_is_what_a_teacher_alone_turns_on(tmp_path):
    planned = plan(tmp_path)
    cfg = planned.alone(0).cfg.clone()
    cfg.defrost()
    add_teacher(cfg, quickstart.TEACHER, weights=planned.teacher.weights)
    distilled = planned.distilled(0).cfg
    assert (cfg.KD.LOSSES, cfg.KD.INHERIT) == (distilled.KD.LOSSES, distilled.KD.INHERIT)


def finish(run, ap, seconds):
    Path(run.output_dir).mkdir(parents=True)
    line = {"iteration": 9, "bbox/AP": ap, "bbox/AP50": ap, "time": seconds}
    Path(run.output_dir, "metrics.json").write_text(json.dumps(line) + "\n")


def test_the_student_alone_gets_the_time_of_the_distilled_one(tmp_path):
    planned = plan(tmp_path, "SOLVER.MAX_ITER", "100", "SOLVER.STEPS", "(60,80)")
    finish(planned.alone(0), 20.0, 0.2)
    finish(planned.distilled(0), 35.0, 0.3)
    solver = planned.as_long(0).cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS) == (150, (90, 120))


def test_the_table_is_put_into_words(tmp_path):
    """Over both seeds, the gap is 50 - 25 and the student makes up 15 of it; alone it gains 5 in the same time."""
    planned = plan(tmp_path)
    finish(planned.teacher, 50.0, 1.0)
    runs = {}
    for seed, alone in enumerate((20.0, 30.0)):
        finish(planned.alone(seed), alone, 0.2)
        finish(planned.distilled(seed), 40.0, 0.2)
        finish(planned.as_long(seed), 30.0, 0.2)
        runs[seed] = planned.teacher, planned.alone(seed), planned.as_long(seed), planned.distilled(seed)
    words = quickstart.what_it_shows(runs)
    for part in ("25.0 AP more", "60%", "+15.0 AP", "same time gives +5.0 AP", "2 seeds"):
        assert part in words, words


def test_the_distilled_config_is_what_the_arguments_make(tmp_path):
    """configs/Quickstart/distilled.yaml, with KD keys, and --teacher, without: the same run."""
    by_arguments = plan("output/quickstart").distilled(0).cfg
    arguments = ["--config-file", str(ROOT / "configs/Quickstart/distilled.yaml"), "SEED", "0"]
    options = ["OUTPUT_DIR", by_arguments.OUTPUT_DIR]
    written = load_config(parse_arguments(argument_parser(), [*arguments, *options]))
    by_arguments, written = (yaml.safe_load(cfg.dump()) for cfg in (by_arguments, written))
    for kd in (by_arguments["KD"], written["KD"]):
        assert [loss.removesuffix("Loss") for loss in kd.pop("LOSSES")] == ["PKD"]
        assert os.path.samefile(ROOT / kd["TEACHER"].pop("CONFIG_FILE"), quickstart.TEACHER)
    assert written == by_arguments


@pytest.mark.slow
def test_the_whole_quickstart_twice(tmp_path):
    tiny = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"]
    code = """
from kd_det.cli import quickstart as q
q.DATASET = "--num-train 8 --num-val 6 --size 64 --num-crops 0 --num-val-crops 0".split()
q.main()
"""

    def go():
        command = [sys.executable, "-c", code, "--output", str(tmp_path), "--seeds", "1", "2", "--opts", *tiny]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    out = go()
    assert out.count("$ python -m kd_det train") == 7 and "reused" not in out
    assert "loads strictly, and gives the same" in out
    assert (tmp_path / "table.md").read_text().strip() in out
    # 6 images, each 320 pixels high: ground truth, teacher, alone, alone for the same time, distilled
    assert cv2.imread(str(tmp_path / "detections.png")).shape == (28 + 6 * 326, 5 * 320 + 4 * 6, 3)
    assert "KD" not in yaml.safe_load((tmp_path / "plain_student.yaml").read_text())

    out = go()
    assert "$ python -m kd_det train" not in out and out.count("is there, reused") == 7
