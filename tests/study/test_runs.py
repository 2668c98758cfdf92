import json
import os
from pathlib import Path

import pytest

from kd_det.study import Run, read_metrics, run_command, runs

CONFIG = Path(__file__).parents[2] / "configs" / "Quickstart" / "student_R_18_FPN.yaml"


@pytest.fixture
def run(tmp_path):
    """A run that was just started: only its config is there."""
    data = tmp_path / "dataset.json"
    data.write_text("{}")
    os.utime(data, (1, 1))
    run = Run("x", "tool.py", str(tmp_path / "x"), ["--config-file", str(CONFIG), "SEED", "3"], [str(data)])
    Path(run.output_dir).mkdir()
    Path(run.output_dir, "config.yaml").write_text(run.cfg().dump())
    return run


def write(folder, *lines):
    Path(folder, "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def finish(run):
    Path(run.weights).touch()
    Path(run.output_dir, "last_checkpoint").write_text("model_final.pth")
    write(run.output_dir, {"bbox/AP": 1.0, "time": 0.1})


def test_a_run_without_checkpoint_is_new(run):
    assert run.state() == "new"
    Path(run.output_dir, "config.yaml").unlink()
    assert run.state() == "new"


def test_a_run_is_resumed_until_it_is_evaluated(run):
    last = Path(run.output_dir, "last_checkpoint")
    last.write_text("model_0000009.pth")
    assert run.state() == "interrupted"
    Path(run.weights).touch()
    assert run.state() == "interrupted"
    finish(run)
    assert run.state() == "finished"


def test_a_finished_run_is_made_anew_for_another_config_or_younger_inputs(run):
    finish(run)
    other = Run("x", "tool.py", run.output_dir, [*run.arguments, "SOLVER.MAX_ITER", "7"], run.inputs)
    assert (run.state(), other.state()) == ("finished", "new")
    os.utime(run.inputs[0])
    os.utime(run.weights, (2, 2))
    assert run.state() == "new"
    Path(run.weights).unlink()
    os.utime(Path(run.output_dir, "last_checkpoint"), (2, 2))
    assert run.state() == "new"  # nor is it resumed


def test_a_wrong_config_removes_nothing(run):
    finish(run)
    other = Run("x", "tool.py", run.output_dir, [*run.arguments, "SOLVER.NO_SUCH_KEY", "7"], run.inputs)
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        other.complete()
    assert Path(run.weights).exists()


def test_the_weight_of_a_loss_matters_where_it_is_named(run, tmp_path):
    def other(*pairs):
        return Run("x", "tool.py", run.output_dir, [*run.arguments, *pairs], run.inputs)

    finish(run)
    assert other("KD.NST.WEIGHT", "3.0").state() == "finished"  # a plain student
    distilled = ["MODEL.META_ARCHITECTURE", "Distiller", "KD.LOSSES", "('NST',)"]
    Path(run.output_dir, "config.yaml").write_text(other(*distilled).cfg().dump())
    assert other(*distilled, "KD.OVERHAUL.WEIGHT", "3.0").state() == "finished"
    assert other(*distilled, "KD.NST.WEIGHT", "3.0").state() == "new"
    assert other(*distilled, "KD.TEACHER.WEIGHTS", "other.pth").state() == "new"
    Path(run.output_dir, "config.yaml").write_text("VERSION: 2\n")
    assert run.state() == "new"


def test_what_is_there_is_not_trained_again(run, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(runs, "run_command", lambda command, log: commands.append(command))
    finish(run)
    run.complete()
    assert commands == [] and f"{run.weights} is there, reused" in capsys.readouterr().out
    Path(run.output_dir, "metrics.json").unlink()
    run.complete()
    assert commands.pop() == ["tool.py", "--resume", *run.command[1:]]
    os.utime(run.weights, (0, 0))
    run.complete()
    assert commands.pop() == run.command and not Path(run.output_dir).exists()
    run.complete()
    assert commands.pop() == run.command
    Path(run.output_dir).mkdir()
    Path(run.output_dir, "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds files, but no run"):
        run.complete()
    assert commands == [] and Path(run.output_dir, "thesis.txt").exists()


def test_a_failing_command_is_one_line_for_the_user(tmp_path, capfd):
    (tmp_path / "tool.py").write_text("import sys; print('a log'); sys.exit(int(sys.argv[1]))")
    with pytest.raises(ValueError, match=r"tool.py ended with exit status 3; run this again"):
        run_command([str(tmp_path / "tool.py"), "3"])
    assert "a log" in capfd.readouterr().out
    with open(tmp_path / "log", "w") as log:
        run_command([str(tmp_path / "tool.py"), "0"], log=log.fileno())
    assert "a log" not in capfd.readouterr().out and (tmp_path / "log").read_text() == "a log\n"


def test_the_last_evaluation_and_the_median_step_are_read(tmp_path):
    write(
        tmp_path,
        {"iteration": 19, "time": 0.9},
        {"iteration": 39, "time": 0.2},
        {"iteration": 40, "bbox/AP": 10.0, "bbox/AP50": 20.0},
        {"iteration": 59, "time": 0.3},
        {"iteration": 60, "bbox/AP": 12.0, "bbox/AP50": 25.0},
    )
    assert read_metrics(str(tmp_path)) == {"bbox/AP": 12.0, "bbox/AP50": 25.0, "time": 0.3}
    assert read_metrics(str(tmp_path), "classification") == {}


def test_a_run_without_an_evaluation_has_no_metrics(tmp_path):
    assert read_metrics(str(tmp_path)) == {}
    write(tmp_path, {"iteration": 19, "time": 0.9})
    assert read_metrics(str(tmp_path)) == {}


def test_a_line_that_a_kill_cut_off_is_skipped(tmp_path):
    write(tmp_path, {"iteration": 40, "time": 0.5, "bbox/AP": 10.0})
    with open(tmp_path / "metrics.json", "a") as f:
        f.write('{"iteration": 60, "bbox/A')
    assert read_metrics(str(tmp_path)) == {"bbox/AP": 10.0, "time": 0.5}
