from pathlib import Path

import pytest
from detectron2.config import CfgNode

from kd_det.errors import UserError
from kd_det.study import Run
from kd_det.study.parallel import complete_all

APPEND = "import sys, time; open('order', 'a').write(sys.argv[1] + '\\n'); time.sleep(float(sys.argv[2]))"


class Stub(Run):
    """Writes its name, and waits, instead of training."""

    def __init__(self, name, seconds=0.0, *, inputs=(), command=None, is_finished=False):
        super().__init__(name, [], CfgNode({"OUTPUT_DIR": f"out/{name}"}), list(inputs))
        self.script = [] if is_finished else command or ["-c", APPEND, name, str(seconds)]

    def prepare(self):
        return self.script


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def order():
    return Path("order").read_text().split()


def test_a_run_waits_for_the_one_whose_weights_it_starts_from():
    teacher, alone = Stub("teacher", 0.5), Stub("alone")
    student, seen = Stub("student", inputs=[teacher.weights, "a.pth"]), []
    complete_all([teacher, student, alone], jobs=2, finished=lambda run: seen.append(run.name))
    assert order()[-1] == "student" and sorted(order()) == ["alone", "student", "teacher"]
    assert seen == ["alone", "teacher", "student"]


def test_one_at_a_time_keeps_the_order_and_passes_over_what_is_finished():
    seen = []
    runs = [Stub("a"), Stub("b", is_finished=True), Stub("c")]
    complete_all(runs, jobs=1, finished=lambda run: seen.append(run.name))
    assert order() == ["a", "c"] and seen == ["a", "b", "c"]


def test_after_a_failure_those_beside_it_end_and_no_other_starts():
    failing = Stub("failing", command=["-c", "print('because'); raise SystemExit(3)"])
    with pytest.raises(UserError, match=r"failing.* 3; .*out/failing\.log"):
        complete_all([failing, Stub("beside", 0.5), Stub("later")], jobs=2)
    assert order() == ["beside"]
    assert Path("out/failing.log").read_text() == "because\n"


def test_several_run_at_the_same_time():
    wait = "import os, sys, time\nopen(sys.argv[1], 'w')\nwhile not os.path.exists(sys.argv[2]): time.sleep(0.01)"
    complete_all([Stub(a, command=["-c", wait, a, b]) for a, b in ("xy", "yx")], jobs=2)
    assert Path("x").exists() and Path("y").exists()
