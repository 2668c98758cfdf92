import json

import pytest

from kd_det.visualization import comparison_table, read_metrics, seeds_table


def write(folder, *lines):
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


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


def test_a_run_without_an_evaluation_has_no_metrics(tmp_path):
    assert read_metrics(str(tmp_path)) == {}
    write(tmp_path, {"iteration": 19, "time": 0.9})
    assert read_metrics(str(tmp_path)) == {}


def test_a_line_that_a_kill_cut_off_is_skipped(tmp_path):
    write(tmp_path, {"iteration": 40, "time": 0.5, "bbox/AP": 10.0})
    with open(tmp_path / "metrics.json", "a") as f:
        f.write('{"iteration": 60, "bbox/A')
    assert read_metrics(str(tmp_path)) == {"bbox/AP": 10.0, "time": 0.5}


def test_comparison_table():
    table = comparison_table([("a", 1234567, {"time": 0.12345, "bbox/AP": 40.04, "bbox/AP50": 61.25})])
    header, _, row = table.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["model", "parameters", "s / step", "AP", "AP50"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["a", "1,234,567", "0.123", "40.0", "61.2"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_seeds_table_has_a_mean_from_two_seeds_on(seeds):
    results = dict(list({0: (10.0, 14.0), 7: (20.0, 18.0)}.items())[:seeds])
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in seeds_table(("x", "y"), results).splitlines()]
    assert rows[0] == ["seed", "AP x", "AP y", "difference"]
    assert rows[2] == ["0", "10.0", "14.0", "+4.0"]
    # means of 10 and 20, of 14 and 18, of +4 and -2
    assert rows[3:] == ([] if seeds == 1 else [["7", "20.0", "18.0", "-2.0"], ["mean", "15.0", "16.0", "+1.0"]])
