import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from kd_det.cli import argument_parser, load_config, parse_arguments
from kd_det.study import Run
from kd_det.study.results import Record, Results, config_hash, results_table

CONFIG = Path(__file__).parents[2] / "configs" / "Quickstart" / "student_R_18_FPN.yaml"


def planned(folder, *pairs) -> Run:
    arguments = ["--config-file", str(CONFIG), *pairs]
    return Run(
        "x", ["train", *arguments], load_config(parse_arguments(argument_parser(), [*arguments, "OUTPUT_DIR", folder]))
    )


def record(row, seed, ap, **values) -> Record:
    scores = {"bbox/AP": [[5, 0.1, 1.0], [9, 0.2, ap]], "bbox/AP50": [[9, 0.2, 2 * ap]]}
    kept = {"arguments": "train", "config": "0", "steps": 10, "seconds": 0.5, "scores": scores, "machine": "CPU"}
    return Record(row, seed, **{**kept, **values})


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_has_means_errors_gains_and_the_gap():
    """alone: mean 11, standard deviation 2 of 3 seeds; distilled: 17 and 13, so 15 and 2 * sqrt(2) / sqrt(2) = 2.
    The gain is paired: 8 and 2 at seeds 0 and 1. The teacher has no seed in common with the student alone: 21 - 11."""
    records = [record("teacher", 9, 21.0), *(record("alone", s, ap) for s, ap in enumerate([9.0, 11.0, 13.0]))]
    records += [record("nst", 0, 17.0), record("nst", 1, 13.0)]
    header, _, teacher, alone, nst = cells(results_table(records))
    assert header == ["run", "seeds", "AP", "AP50", "gain", "of the gap", "steps"]
    assert teacher == ["teacher", "1", "21.0", "42.0", "+10.0", "", "10"]
    assert alone == ["alone", "3", "11.0 ± 1.2", "22.0", "", "", "10"]  # 2 / sqrt(3) = 1.15
    assert nst == ["nst", "2", "15.0 ± 2.0", "30.0", "+5.0 ± 3.0", "50%", "10"]


def test_without_teacher_or_student_alone_there_is_no_gap():
    assert cells(results_table([record("a", 0, 1.0)]))[0] == ["run", "seeds", "AP", "AP50", "steps"]
    header, _, a, alone = cells(results_table([record("a", 0, 3.0), record("alone", 0, 1.0)]))
    assert "of the gap" not in header and a[4] == "+2.0" and alone[4] == ""


@pytest.mark.parametrize("teacher_ap", [1.0, 0.5, math.nan])
def test_of_a_teacher_that_is_not_ahead_no_part_is_made_up(teacher_ap):
    records = [record("teacher", 9, teacher_ap), record("alone", 0, 1.0), record("a", 0, 3.0)]
    header, *_, a = cells(results_table(records))
    assert a[header.index("gain")] == "+2.0" and a[header.index("of the gap")] == ""


def test_a_record_is_found_by_row_seed_and_config_and_replaced(tmp_path):
    file = tmp_path / "results" / "r.json"
    results, run = Results(str(file)), planned("out", "SEED", "1")
    results.add(record("nst", 0, 1.0), ["alone", "nst"])
    results.add(record("alone", 0, 2.0), ["alone", "nst"])
    results.add(record("nst", 1, 3.0, config=config_hash(run)), ["alone", "nst"])
    read = Results(str(file))
    assert [(r.row, r.seed) for r in read.records] == [("alone", 0), ("nst", 0), ("nst", 1)]
    assert read.find("nst", run).last("bbox/AP") == 3.0
    assert read.find("alone", run) is None
    assert read.find("nst", planned("out", "SEED", "1", "SOLVER.MAX_ITER", "7")) is None
    read.add(replace(read.records[1], seconds=2.0), ["alone", "nst"])
    assert [r["seconds"] for r in json.loads(file.read_text())] == [0.5, 2.0, 0.5]


def test_where_a_run_writes_to_and_what_it_runs_on_do_not_matter_for_its_config():
    """A result from a GPU is not repeated on a machine without one."""
    on_gpu = planned("b")
    on_gpu.cfg.defrost()
    on_gpu.cfg.MODEL.DEVICE = "cuda"
    assert config_hash(planned("a")) == config_hash(planned("b")) == config_hash(on_gpu)
    assert config_hash(planned("a")) != config_hash(planned("a", "SOLVER.BASE_LR", "0.5"))


def test_a_record_keeps_the_scores_of_every_evaluation(tmp_path):
    run = planned(str(tmp_path), "SEED", "4", "SOLVER.MAX_ITER", "20")
    lines = [{"iteration": 9, "time": 3.6, "bbox/AP": 1.0, "bbox/AP-cat": 5.0, "rpn/num_pos_anchors": 3.0}]
    lines += [{"iteration": 19, "time": 7.2, "bbox/AP": 2.0, "bbox/APs": math.nan, "total_loss": 3.0}]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = Record.of("alone", run)
    assert (found.row, found.seed, found.steps, found.seconds) == ("alone", 4, 20, pytest.approx(5.4))
    assert found.scores == {"bbox/AP": [[9, 0.01, 1.0], [19, 0.03, 2.0]]}  # 10 steps of 3.6 s, 10 of 7.2 s
    assert found.last("bbox/AP") == 2.0 and math.isnan(found.last("bbox/AP50"))
    assert found.history().scores() == ["bbox/AP"]


def test_a_run_of_untimed_steps_is_kept_as_valid_json(tmp_path):
    """Detectron2 does not time the first three."""
    run = planned(str(tmp_path), "SOLVER.MAX_ITER", "2")
    (tmp_path / "metrics.json").write_text(json.dumps({"iteration": 1, "bbox/AP": 3.0}) + "\n")
    found = Record.of("a", run)
    assert found.seconds == 0 and found.scores == {"bbox/AP": [[1, 0, 3.0]]}
