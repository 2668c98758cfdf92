import json
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from kd_det.visualization import RunSummary, draw_curves, plot_curves, read_history, runs_table
from kd_det.visualization.curves import chart_svg
from kd_det.visualization.history import align


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + '\n{"cut off')
    return read_history(str(folder))


def line(iteration, **values):
    return {"iteration": iteration, "time": 0.5, "total_loss": 2.0, "loss_cls": 1.5, "loss_nst": 0.5, **values}


@pytest.fixture
def history(tmp_path):
    lines = [line(9), line(19), line(29, loss_nst=9.0), line(19, loss_nst=0.25), line(29, time=1.5)]
    return write(tmp_path, [*lines, {"iteration": 30, "bbox/AP": 40.0, "bbox/APl": float("nan"), "bbox/AP-cat": 12.5}])


def test_a_resumed_run_has_the_last_of_what_it_trained_twice(history):
    x, y = history.series("loss_nst")
    assert x.tolist() == [9, 19, 29] and y.tolist() == [0.5, 0.25, 0.5]
    assert history.losses() == ["loss_cls", "loss_nst"] and history.scores() == ["bbox/AP"]
    assert not len(history.series("bbox/APl")[0]) and not len(history.series("no such key")[0])
    assert history.last()["bbox/AP"] == 40.0


def test_hours_are_those_of_the_steps_before(history):
    # ten steps of 0.5 s, ten more, ten of 1.5 s
    np.testing.assert_allclose(3600 * history.series("loss_cls", against="hours")[0], [5, 10, 25])
    np.testing.assert_allclose(3600 * history.series("bbox/AP", against="hours")[0], [25])


def test_no_metrics_are_no_error(tmp_path):
    assert read_history(str(tmp_path)).values == {}


def test_series_are_aligned_where_all_of_them_are():
    x, y = align([(np.array([0.0, 2, 4]), np.array([0.0, 2, 4])), (np.array([1.0, 5]), np.array([10.0, 50]))])
    assert x.tolist() == [1, 2, 4] and y.tolist() == [[1, 2, 4], [10, 20, 40]]
    assert align([])[0].shape == (0,)


def test_seeds_are_a_band_around_their_mean(tmp_path):
    seeds = [write(tmp_path / str(a), [line(9, loss_cls=a), line(19, loss_cls=2 * a)]) for a in (1.0, 3.0)]
    axes = Figure().subplots()
    plot_curves(axes, {"mine": seeds, "without": [read_history(str(tmp_path / "none"))]}, "loss_cls")
    (curve,) = axes.get_lines()
    assert curve.get_ydata().tolist() == [2, 4] and curve.get_label() == "mine (2 seeds)"
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1 and band[:, 1].max() == 6


def test_curves_are_written_as_png_and_svg(tmp_path, history):
    png, svg = draw_curves(str(tmp_path / "curves"), {"a": [history], "b": [history]})
    assert cv2.imread(png).shape[1] > 1000
    text = "".join(ET.parse(svg).getroot().itertext())
    assert all(word in text for word in ("bbox/AP", "minutes of training steps", "loss_nst"))


def test_a_chart_takes_the_pages_ink(history):
    svg = chart_svg({"a": [history]}, "loss_cls")
    assert svg.startswith("<svg") and "currentColor" in svg and "#010203" not in svg and "#ffffff" not in svg
    ET.fromstring(svg.replace("xlink:href", "href"))
    assert chart_svg({"a": [history]}, "loss_cls") == svg


SUMMARIES = [
    RunSummary("alone", 90, {"bbox/AP": [40.0, 42.0], "bbox/APl": [float("nan")]}, 1234567, 2.5e9, 0.1234),
    RunSummary("taught", 90, {"bbox/AP": [43.21], "segm/AP": [30.0]}, weights={"NST": 20.0, "DKD": 0.5}),
]


def test_a_table_of_runs():
    header, _, alone, taught = (
        [cell.strip() for cell in row.strip("|").split("|")] for row in runs_table(SUMMARIES, "md").splitlines()
    )
    assert header == ["run", "steps", "AP", "APl", "segm/AP", "parameters", "GFLOPs", "s / step", "losses"]
    assert alone == ["alone", "90", "41.0 ± 1.4", "-", "-", "1,234,567", "2.5", "0.123", "-"]
    assert taught == ["taught", "90", "43.2", "-", "30.0", "-", "-", "-", "NST 20, DKD 0.5"]


def test_a_table_as_csv_and_text():
    assert runs_table(SUMMARIES, "csv").splitlines()[1] == 'alone,90,41.0 ± 1.4,-,-,"1,234,567",2.5,0.123,-'
    assert "|" not in runs_table(SUMMARIES)
