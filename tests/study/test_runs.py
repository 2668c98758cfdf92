import json
import os
import re
from pathlib import Path

import pytest

from kd_det.cli import argument_parser, load_config, parse_arguments
from kd_det.study import Run, read_metrics, run_command, runs
from kd_det.study.run_config import used_config

CONFIG = Path(__file__).parents[2] / "configs" / "Quickstart" / "student_R_18_FPN.yaml"


@pytest.fixture
def run(tmp_path):
    """A run that was just started: only its config is there."""
    data = tmp_path / "dataset.json"
    data.write_text("{}")
    os.utime(data, (1, 1))
    run = planned(["--config-file", str(CONFIG), "SEED", "3"], str(tmp_path / "x"), [str(data)])
    Path(run.output_dir).mkdir()
    Path(run.output_dir, "config.yaml").write_text(run.cfg.dump())
    return run


def planned(arguments, output_dir, inputs=()) -> Run:
    cfg = load_config(parse_arguments(argument_parser(), [*arguments, "OUTPUT_DIR", output_dir]))
    return Run("x", ["train", *arguments], cfg, list(inputs))


def other(run, *pairs) -> Run:
    return planned([*run.command[1:], *pairs], run.output_dir, run.inputs)


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
    assert (run.state(), other(run, "SOLVER.MAX_ITER", "7").state()) == ("finished", "new")
    os.utime(run.inputs[0])
    os.utime(run.weights, (2, 2))
    assert run.state() == "new"
    Path(run.weights).unlink()
    os.utime(Path(run.output_dir, "last_checkpoint"), (2, 2))
    assert run.state() == "new"  # nor is it resumed


@pytest.mark.parametrize("written", [lambda cfg: cfg, used_config])
def test_the_weight_of_a_loss_matters_where_it_is_named(run, written):
    """Also where the folder was written with the nodes of all losses, as it once was."""
    finish(run)
    assert other(run, "KD.NST.WEIGHT", "3.0").state() == "finished"  # a plain student
    distilled = ["MODEL.META_ARCHITECTURE", "Distiller", "KD.LOSSES", "('NST',)"]
    Path(run.output_dir, "config.yaml").write_text(written(other(run, *distilled).cfg).dump())
    assert other(run, *distilled, "KD.OVERHAUL.WEIGHT", "3.0").state() == "finished"
    assert other(run, *distilled, "KD.NST.WEIGHT", "3.0").state() == "new"
    assert other(run, *distilled, "KD.TEACHER.WEIGHTS", "other.pth").state() == "new"
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
    arguments = [*run.command[1:], "OUTPUT_DIR", run.output_dir]
    assert commands.pop() == ["-m", "kd_det", "train", "--resume", *arguments]
    os.utime(run.weights, (0, 0))
    run.complete()
    assert commands.pop() == ["-m", "kd_det", "train", *arguments] and not Path(run.output_dir).exists()
    assert Path(f"{run.output_dir}.old", "model_final.pth").exists()  # which may have taken days
    assert f"moved to {run.output_dir}.old" in capsys.readouterr().out
    Path(run.output_dir).mkdir()
    Path(run.output_dir, "config.yaml").touch()  # of a run that was killed
    run.complete()
    assert commands.pop() == ["-m", "kd_det", "train", *arguments]
    assert not Path(run.output_dir).exists() and Path(f"{run.output_dir}.old", "model_final.pth").exists()
    Path(run.output_dir).mkdir()
    Path(run.output_dir, "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds files, but no run"):
        run.complete()
    assert commands == [] and Path(run.output_dir, "thesis.txt").exists()


def test_a_failing_command_is_one_line_for_the_user(tmp_path, capfd):
    (tmp_path / "tool.py").write_text("import sys; print('a log'); sys.exit(int(sys.argv[1]))")
    with pytest.raises(ValueError, match=r"tool.py 3 ended with exit status 3; run this again"):
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


def test_the_config_of_a_run_holds_what_the_run_uses(tmp_path):
    """D52: neither nodes of other losses nor YAML's references from one loss to another."""
    distilled = ["MODEL.META_ARCHITECTURE", "Distiller", "KD.LOSSES", "('NST','PKD')"]
    plain = planned(["--config-file", str(CONFIG)], str(tmp_path)).cfg
    cfg = planned(["--config-file", str(CONFIG), *distilled], str(tmp_path)).cfg
    assert {"NST", "PKD", "TEACHER"} <= set(used_config(cfg).KD) and "AT" not in used_config(cfg).KD
    trainers = {"AMP_PRECISION", "BEST_METRIC", "EMA_DECAY", "IMPORTS", "NON_FINITE", "RESUME_SOLVER", "WRITERS"}
    assert set(used_config(plain).KD) == trainers and "AT" in plain.KD
    for text in (used_config(cfg).dump(), used_config(plain).dump()):
        assert not re.search(r"[&*]id\d", text)
