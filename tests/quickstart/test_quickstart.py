import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import pytest
import yaml

from kd_det.cli import argument_parser, load_config, parse_arguments, quickstart

ROOT = Path(__file__).parents[2]


def test_alone_and_distilled_differ_in_the_teacher_only(tmp_path):
    args = Namespace(output=str(tmp_path), seeds=[0, 5], opts=["SOLVER.MAX_ITER", "7"])
    teacher, pairs = quickstart.plan(args, str(tmp_path))
    assert list(pairs) == [0, 5]
    alone, distilled = pairs[5]
    at = distilled.command.index("--teacher")
    assert [x for i, x in enumerate(distilled.command) if not at <= i < at + 6] == alone.command
    assert distilled.command[at + 3] == teacher.weights and teacher.weights in distilled.inputs
    assert "5" == alone.command[alone.command.index("SEED") + 1]
    assert "7" == teacher.command[teacher.command.index("SOLVER.MAX_ITER") + 1]


def test_the_distilled_config_is_what_the_arguments_make(tmp_path):
    """configs/Quickstart/student_distilled.yaml, with KD keys, and --teacher, without: the same run."""
    args = Namespace(output="output/quickstart", seeds=[0], opts=[])
    _, pairs = quickstart.plan(args, str(tmp_path))
    by_arguments = pairs[0][1].cfg
    arguments = ["--config-file", str(ROOT / "configs/Quickstart/student_distilled.yaml"), "SEED", "0"]
    options = ["OUTPUT_DIR", by_arguments.OUTPUT_DIR]
    written = load_config(parse_arguments(argument_parser(), [*arguments, *options]))
    by_arguments, written = (yaml.safe_load(cfg.dump()) for cfg in (by_arguments, written))
    for kd in (by_arguments["KD"], written["KD"]):
        assert [loss.removesuffix("Loss") for loss in kd.pop("LOSSES")] == ["NST", "SoftTarget"]
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
    assert out.count("$ python -m kd_det train") == 5 and "reused" not in out
    assert "loads strictly, and gives the same" in out
    assert (tmp_path / "table.md").read_text().strip() in out
    # 6 images, each 320 pixels high: ground truth, teacher, alone, distilled
    assert cv2.imread(str(tmp_path / "detections.png")).shape == (28 + 6 * 326, 4 * 320 + 3 * 6, 3)
    assert "KD" not in yaml.safe_load((tmp_path / "plain_student.yaml").read_text())

    out = go()
    assert "$ python -m kd_det train" not in out and out.count("is there, reused") == 5
