import json
import os
from pathlib import Path

import pytest
import yaml

from kd_det.cli import argument_parser, load_config, parse_arguments, pretrain
from kd_det.errors import UserError
from kd_det.study import compare as module
from kd_det.study import runs

# What each run ends at: seed 0 at this, seed 1 ten higher.
TOP1 = {"at": 50.0, "nst": 70.0}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Two configs, and what stands in for training them: it keeps the commands and writes what the tool writes."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def run_command(command, log=None):
        assert command[:3] == ["-m", "kd_det", "pretrain"]
        seen.append(command[3:])
        args = parse_arguments(argument_parser(), command[3:])
        cfg = load_config(args)
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(cfg.dump())
        (folder / "last_checkpoint").write_text("model_final.pth")
        (folder / "model_final.pth").touch()
        top1 = TOP1[Path(args.config_file).stem] + 10 * cfg.SEED
        last = {"classification/top1": top1, "classification/top5": 90.0}
        lines = ({"time": 0.25}, {"classification/top1": 1.0}, last)
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(runs, "run_command", run_command)
    monkeypatch.setattr(pretrain, "check_run", lambda cfg, args: cfg)
    for name in TOP1:
        keys = {"OUTPUT_DIR": f"out/{name}", "MODEL": {"META_ARCHITECTURE": "ImageClassifier"}, "VERSION": 2}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(keys))
    return seen


def compare(names, seeds, opts=(), **kwargs):
    return module.compare(pretrain.planned_runs([f"{name}.yaml" for name in names], seeds, list(opts), **kwargs))


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_holds_mean_spread_and_each_seed(commands):
    header, _, at, nst = rows(compare(["at", "nst"], [0, 1]))
    assert header == ["config", "top-1", "top-5", "top-1 of seeds 0 1", "s/step"]
    assert at == ["at", "55.0 ± 7.1", "90.0 ± 0.0", "50.0 60.0", "0.25"]  # sqrt(5^2 + 5^2) = 7.07
    assert nst[:4] == ["nst", "75.0 ± 7.1", "90.0 ± 0.0", "70.0 80.0"]
    assert os.path.isdir("out/at/seed_1") and len(commands) == 4


def test_complete_runs_are_read_and_interrupted_ones_resumed(commands, capsys):
    first = compare(["at"], [0])
    assert compare(["at"], [0]) == first and len(commands) == 1
    assert "out/at/seed_0/model_final.pth is there, reused" in capsys.readouterr().out
    os.remove("out/at/seed_0/model_final.pth")
    assert compare(["at"], [0]) == first
    assert commands[1] == ["--resume", *commands[0]]


def test_a_run_of_another_schedule_is_neither_read_nor_removed(commands):
    compare(["at"], [1])
    with pytest.raises(ValueError, match="out/at/seed_1 holds a run of another config.*OUTPUT_DIR FOLDER"):
        compare(["nst", "at"], [1], ["SOLVER.MAX_ITER", "7"])
    assert len(commands) == 1 and os.path.isfile("out/at/seed_1/model_final.pth")
    compare(["at"], [1], ["SOLVER.MAX_ITER", "7", "OUTPUT_DIR", "other"])
    assert len(commands) == 2


def test_a_folder_of_other_files_is_left_alone(commands, tmp_path):
    folder = tmp_path / "out" / "at" / "seed_0"
    folder.mkdir(parents=True)
    compare(["at"], [0])
    for path in folder.iterdir():
        path.unlink()
    (folder / "thesis.txt").touch()
    with pytest.raises(ValueError, match="or other files"):
        compare(["at"], [0])
    assert (folder / "thesis.txt").exists() and len(commands) == 1
    (folder / "thesis.txt").rename(folder / "config.yaml")  # a run that failed before its first checkpoint
    compare(["at"], [0])
    assert len(commands) == 2


def test_a_student_of_a_replaced_teacher_is_not_read(commands, tmp_path):
    (tmp_path / "teacher.pth").touch()
    os.utime("teacher.pth", (1, 1))
    opts = ["KD.TEACHER.WEIGHTS", "teacher.pth"]
    compare(["at"], [0], opts)
    compare(["at"], [0], opts)
    os.utime("out/at/seed_0/model_final.pth", (1, 1))
    os.utime("teacher.pth")
    with pytest.raises(ValueError, match="of a teacher that was replaced since"):
        compare(["at"], [0], opts)


def test_options_reach_every_run(commands):
    compare(["at", "nst"], [3], ["OUTPUT_DIR", "elsewhere"], num_gpus=2)
    assert sorted(os.listdir("elsewhere")) == ["at", "nst"] and os.path.isdir("elsewhere/nst/seed_3")
    assert all(command[:2] == ["--num-gpus", "2"] for command in commands)


@pytest.mark.parametrize(
    "names, opts, message",
    [
        (["at", "none"], [], r"\.yaml files that exist; missing: none\.yaml\."),
        ([], [], "missing: all"),
        (["at"], ["OUTPUT_DIR"], "KEY VALUE pairs behind the configs, found OUTPUT_DIR"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_run(commands, names, opts, message):
    with pytest.raises(ValueError, match=message):
        compare(names, [0], opts)
    assert not commands and not os.path.exists("out")


def test_every_config_is_checked_before_the_first_run(commands, monkeypatch):
    def check_run(cfg, args):
        if args.config_file == "nst.yaml":
            raise UserError("its teacher is not there")

    monkeypatch.setattr(pretrain, "check_run", check_run)
    with pytest.raises(ValueError, match="^nst.yaml: its teacher is not there"):
        compare(["at", "nst"], [0])
    assert not commands


def test_a_config_without_a_folder(commands, tmp_path):
    (tmp_path / "at.yaml").write_text("VERSION: 2\n")
    with pytest.raises(ValueError, match="at.yaml: it sets no OUTPUT_DIR"):
        compare(["at"], [0])
