from kd_det.visualization import comparison_table


def test_comparison_table():
    table = comparison_table([("a", 1234567, {"time": 0.12345, "bbox/AP": 40.04, "bbox/AP50": 61.25})])
    header, _, row = table.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["model", "parameters", "s / step", "AP", "AP50"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["a", "1,234,567", "0.123", "40.0", "61.2"]
