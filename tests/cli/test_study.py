"""kd-det study: which runs it makes of a file or of configs, and what it leaves."""

import json
import re
from pathlib import Path

import pytest
import yaml

from kd_det.cli import study
from kd_det.study.results import Record, Results
from kd_det.study.run_config import used_config
from tests.digits_data import digits_root  # noqa: F401

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "Quickstart"
STUDENT = f"--config-file {CONFIGS / 'student.yaml'}"
TAUGHT = f"--config-file {CONFIGS / 'distilled.yaml'} KD.TEACHER.WEIGHTS out/teacher/seed_7/model_final.pth"
ROWS = {
    "controls": {"teacher": STUDENT, "alone": STUDENT},
    "methods": {"PKD": TAUGHT, "PKD 5": f"{TAUGHT} KD.PKD.WEIGHT 5.0"},
}
FILE = {"rows": ROWS, "output": "out", "results": "kept/results.json", "seeds": [1, 2], "seeds_of": {"teacher": [7]}}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The runs that were trained, in a folder of its own. A stand-in writes what they do; AP is 10 times the seed."""
    monkeypatch.chdir(tmp_path)
    seen = []

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


def run(*arguments, **changed):
    Path("study.yaml").write_text(yaml.safe_dump({**FILE, **changed}, sort_keys=False))
    study.main(["study.yaml", *arguments])


def test_each_row_is_trained_with_its_seeds_and_never_again(trained, capsys):
    run()
    seeds = [f"{row}, seed {seed}" for row in ("alone", "PKD", "PKD 5") for seed in (1, 2)]
    assert trained == ["teacher, seed 7", *seeds]
    found = capsys.readouterr().out
    assert re.search(r"teacher +\| +1 \| +70.0 .*\n.*alone +\| +2 \| 15.0 ± 5.0", found)
    assert "**controls**" in found and "**methods**" in found
    assert Path("kept/results.md").read_text() in found
    assert Path("kept/results.png").is_file() and Path("kept/results.svg").is_file()
    assert len(json.loads(Path("kept/results.json").read_text())) == 7
    run()
    assert len(trained) == 7
    changed = {"rows": {**ROWS, "methods": {"PKD": f"{TAUGHT} KD.PKD.WEIGHT 7.0"}}}
    run(**changed)
    assert trained[7:] == ["teacher, seed 7", "PKD, seed 1", "PKD, seed 2"]  # the teacher left no weights in this test


def test_results_of_a_config_that_was_changed_are_shown_as_such(trained, capsys):
    run()
    capsys.readouterr()
    run("--only-show", rows={**ROWS, "methods": {"PKD": f"{TAUGHT} KD.PKD.WEIGHT 7.0"}})
    found = capsys.readouterr().out
    assert "2 results are of another config" in found and re.search(r"PKD +\| +2 \|", found)


def test_a_subset_brings_the_teacher_that_it_needs(trained, capsys):
    run("--rows", "PKD*", "--seeds", "2")
    assert trained == ["teacher, seed 7", "PKD, seed 2", "PKD 5, seed 2"]
    run("--only-show")
    assert len(trained) == 3 and "PKD 5" in capsys.readouterr().out


def test_the_tables_of_another_machine_need_no_run(trained, capsys):
    run()
    table = Path("kept/results.md").read_text()
    Path("out").rename("elsewhere")
    run()
    assert len(trained) == 7 and Path("kept/results.md").read_text() == table


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"rows": {"a": "--config-file x.yaml"}}, "expected rows: {GROUP: {NAME: ARGUMENTS}}, found"),
        ({"seed": [1]}, "Unknown key of a study 'seed'. Did you mean 'seeds'"),
        ({"seeds": 3}, "expected seeds as a list of whole numbers, found 3"),
        ({"rows": {"a": {"x": None}}}, "expected the arguments of row x as a text, found None"),
        ({"seeds_of": {"nst": [1]}}, "Unknown row 'nst'"),
        ({"pictured": ["at"]}, "Unknown row 'at'"),
        ({"rows": {"a": {"x": STUDENT}, "b": {"x": STUDENT}}}, "two rows are named x"),
        ({"rows": {"a": {"x": f"{STUDENT} SOLVER.MAX_ITR 3"}}}, "row x: .*SOLVER.MAX_ITR"),
        ({"rows": {"a": {"x": f"{TAUGHT} KD.LOSSES ('NSTT',)"}}}, "row x: .*NSTT"),
        ({"rows": {"a": {"x": f"{STUDENT} --teacher a.yaml"}}}, "row x: "),
        ({"rows": {"a": {"x": f"{STUDENT} --nonsense 3"}}}, "row x: "),
        ({"rows": {"a": {"x": "--config-file no.yaml"}}}, "row x: .*no.yaml"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_anything_is_trained(trained, capsys, changed, message):
    with pytest.raises(SystemExit):
        run(**{"seeds_of": {}, **changed})
    found = capsys.readouterr().err
    assert re.search(message.replace("{", r"\{"), found) and found.count("\n") == 1
    assert not trained


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "at"], "fits no row; the rows are teacher, alone, PKD, PKD 5"),
        (["--jobs", "0"], "--jobs must be at least 1, found 0"),
        (["--opts", "SEED", "1"], "--opts and --import are for configs"),
    ],
)
def test_wrong_arguments(trained, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err and not trained


def test_configs_of_ones_own_are_trained_and_compared(tmp_path, monkeypatch, digits_root, capsys):  # noqa: F811
    """Real runs of a step, in processes of their own: table, curves, and ground truth beside detections."""
    monkeypatch.chdir(tmp_path)
    data = f"from kd_det.quickstart import register_digits\nregister_digits({str(digits_root)!r}, 'mine')\n"
    Path("data.py").write_text(data)
    datasets = {"TRAIN": ["mine_coco_train"], "TEST": ["mine_coco_val"]}
    opts = {
        "DATASETS": datasets,
        "SOLVER": {"MAX_ITER": 1, "STEPS": [], "IMS_PER_BATCH": 1},
        "INPUT": {"MIN_SIZE_TEST": 64},
    }
    for name, width in (("narrow", 8), ("wide", 12)):
        model = {"RESNETS": {"RES2_OUT_CHANNELS": width}}
        base = {"_BASE_": str(CONFIGS / "student.yaml"), "MODEL": model, **opts}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(base))
    study.main(["narrow.yaml", "wide.yaml", "--seeds", "0", "--jobs", "2", "--output", "mine", "--import", "data.py"])
    assert re.search(r"narrow +\| +1 \|.*\n.*wide +\| +1 \|", capsys.readouterr().out)
    for ending in (".json", ".md", ".png", ".svg", "_detections.png"):
        assert Path(f"mine/results{ending}").is_file(), ending
    assert Path("mine/narrow/seed_0.log").is_file()


def test_a_group_of_backbones_is_judged_by_their_own_metric():
    """The student alone has none of it, and stands in the detectors' table only."""
    rows = {"backbones": {"labels": "pretrain"}, "detectors": {"alone": "", "from labels": ""}}
    scores = {"labels": {"classification/top1": [[9, 0, 88.0]]}, "alone": {"bbox/AP": [[9, 0, 40.0]]}}
    scores["from labels"] = {"bbox/AP": [[9, 0, 46.0]]}
    records = [
        Record(row, 0, arguments="", config="", steps=9, seconds=0.1, scores=found, machine="")
        for row, found in scores.items()
    ]
    backbones, detectors = study.study_tables(study.Study(rows), records).split("**detectors**")
    assert re.search(r"top1.*\n.*\n\| labels +\| +1 \| +88.0", backbones) and "alone" not in backbones
    assert re.search(r"from labels +\| +1 \| +46.0 \| +\+6.0", detectors)


STUDIES = [path.stem for path in sorted((ROOT / "configs/Study").glob("*.yaml")) if "\nrows:" in path.read_text()]


@pytest.mark.parametrize("name", STUDIES)
def test_the_tables_of_the_documentation_are_those_of_the_kept_results(name):
    """docs/study/*.md are written by the command; nobody edits them."""
    file = study.read_study(str(ROOT / f"configs/Study/{name}.yaml"))
    assert file.results == f"docs/study/{name}.json"
    records = Results(str(ROOT / file.results)).records
    assert {record.row for record in records} <= set(file.names())
    assert study.study_tables(file, records) == (ROOT / f"docs/study/{name}.md").read_text()
