"""One HTML page about several runs, which holds everything it shows and needs no network."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import jinja2
import numpy as np
from matplotlib.colors import to_hex

from kd_det.visualization.curves import Runs, chart_svg, loss_shares_svg
from kd_det.visualization.history import History
from kd_det.visualization.panels import Panel, Row, overlay

__all__ = ["ReportedRun", "render_report"]


@dataclass
class ReportedRun:
    """
    A run on the page. What is empty is left out.

    Attributes:
        name: of the run.
        history: its metrics.
        facts: in words: where it is, its steps, step time, memory, ...
        command: that started it.
        versions: of the software that it ran on.
        config: the keys that it changed, with the default (empty where there is none) and the value.
        pictures: under a headline, rows of panels.
        left_out: what the page lacks, each with the reason, in a sentence.
    """

    name: str
    history: History
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    pictures: dict[str, list[Row]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def render_report(
    runs: Sequence[ReportedRun], table: tuple[Sequence[str], Sequence[Sequence[str]]], curves: Runs
) -> str:
    """
    The page.

    Args:
        runs: in the order of their sections, with different names.
        table: headers and rows that compare them.
        curves: what the charts show, by name; several histories are seeds of one run.
    """
    scores = list(dict.fromkeys(key for run in runs for key in run.history.scores()))
    losses = list(dict.fromkeys(key for run in runs for key in run.history.losses()))
    charts = [chart_svg(curves, key, against=x) for key in scores for x in ("iteration", "hours")]
    loss_charts = [chart_svg(curves, key) for key in losses]
    defaults = {key: default for run in runs for key, (default, _) in run.config.items() if key != "OUTPUT_DIR"}
    differing = {key: [run.config.get(key, ("", default))[1] for run in runs] for key, default in defaults.items()}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"jpeg": _jpeg, "gradient": _gradient}
    template = environment.from_string((Path(__file__).parent / "report.html").read_text())
    return template.render(
        names=", ".join(curves),
        runs=runs,
        table=table,
        charts=charts,
        loss_charts=loss_charts,
        step_time=chart_svg(curves, "time") if any("time" in run.history.values for run in runs) else "",
        shares={run.name: loss_shares_svg(run.history) for run in runs if run.history.losses()},
        classes=_by_class([run.history for run in runs], scores),
        differing={key: values for key, values in differing.items() if len(set(values)) > 1} if len(runs) > 1 else {},
    )


def _by_class(histories: Sequence[History], scores: Sequence[str]) -> dict[str, dict[str, list[float | None]]]:
    """By task and class, each run's AP."""
    last = [history.last() for history in histories]
    ret: dict[str, dict[str, list[float | None]]] = {}
    for score in scores:
        keys = dict.fromkeys(key for values in last for key in values if key.startswith(f"{score}-"))
        if keys:
            ret[score] = {key.removeprefix(f"{score}-"): [values.get(key) for values in last] for key in keys}
    return ret


def _jpeg(panel: Panel) -> str:
    """A panel as a data URL."""
    _, content = cv2.imencode(".jpg", overlay(panel), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"


def _gradient(panel: Panel) -> str:
    """The colours of a panel's legend, in CSS."""
    stops = panel.colours.to_rgba(np.linspace(*panel.colours.get_clim(), 9))
    return f"linear-gradient(to right, {', '.join(map(to_hex, stops))})"
