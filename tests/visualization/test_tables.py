import pytest

from kd_det.visualization import comparison_table, seeds_table


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
