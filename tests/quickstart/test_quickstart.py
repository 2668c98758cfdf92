import importlib.util
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/quickstart.py"
spec = importlib.util.spec_from_file_location("quickstart", TOOL)
quickstart = importlib.util.module_from_spec(spec)
sys.modules["quickstart"] = quickstart  # dataclasses look their module up
spec.loader.exec_module(quickstart)


def test_alone_and_distilled_differ_in_the_teacher_only(tmp_path):
    args = Namespace(output=str(tmp_path), seeds=[0, 5], opts=["SOLVER.MAX_ITER", "7"])
    teacher, pairs = quickstart.plan(args, str(tmp_path))
    assert list(pairs) == [0, 5]
    alone, distilled = pairs[5]
    at = distilled.command.index("--teacher")
    command = [x for i, x in enumerate(distilled.command) if not at <= i < at + 4]
    assert command[:-1] == alone.command[:-1]  # the last is the folder
    assert distilled.command[at + 3] == teacher.weights and teacher.weights in distilled.inputs
    assert "5" == alone.command[alone.command.index("SEED") + 1]
    assert "7" == teacher.command[teacher.command.index("SOLVER.MAX_ITER") + 1]


def test_the_distilled_config_is_what_the_arguments_make(tmp_path):
    """configs/Quickstart/student_distilled.yaml, with KD keys, and --teacher, without: the same run."""
    args = Namespace(output="output/quickstart", seeds=[0], opts=[])
    _, pairs = quickstart.plan(args, str(tmp_path))
    by_arguments = pairs[0][1].cfg()
    config_file = os.path.join(quickstart.CONFIGS, "student_distilled.yaml")
    arguments = ["--config-file", config_file, "SEED", "0"]
    written = quickstart.Run("x", "tools/train_net.py", by_arguments.OUTPUT_DIR, arguments).cfg()
    by_arguments, written = (yaml.safe_load(cfg.dump()) for cfg in (by_arguments, written))
    for kd in (by_arguments["KD"], written["KD"]):
        assert [loss.removesuffix("Loss") for loss in kd.pop("LOSSES")] == ["NST", "SoftTarget"]
        assert os.path.samefile(ROOT / kd["TEACHER"].pop("CONFIG_FILE"), quickstart.TEACHER)
    assert written == by_arguments


@pytest.mark.slow
def test_the_whole_quickstart_twice(tmp_path):
    tiny = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"]
    code = f"""
import sys; sys.path.insert(0, {str(TOOL.parent)!r})
import quickstart as q
q.DATASET = "--num-train 8 --num-val 6 --size 64 --num-crops 0 --num-val-crops 0".split()
q.run_tool(q.main, q.get_parser().parse_args(sys.argv[1:]))
"""

    def go():
        command = [sys.executable, "-c", code, "--output", str(tmp_path), "--seeds", "1", "2", "--opts", *tiny]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    out = go()
    assert out.count("$ python tools/train_net.py") == 5 and "reused" not in out
    assert "loads strictly, and gives the same" in out
    assert (tmp_path / "table.md").read_text().strip() in out
    # 6 images, each 320 pixels high: ground truth, teacher, alone, distilled
    assert cv2.imread(str(tmp_path / "detections.png")).shape == (28 + 6 * 326, 4 * 320 + 3 * 6, 3)
    assert "KD" not in yaml.safe_load((tmp_path / "plain_student.yaml").read_text())

    out = go()
    assert "$ python tools/train_net.py" not in out and out.count("is there, reused") == 5
