"""Curves of metrics: several runs in one chart, several seeds of one as a band around their mean."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kd_det.visualization.history import History, align

__all__ = ["Runs", "chart_svg", "draw_curves", "loss_shares_svg", "plot_curves"]

# Told apart also by colour-blind readers (after Okabe and Ito), and seen on white as on black.
COLOURS = ("#2A8CD0", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
_INK = "#010203"  # stands for the text's colour of the page that an SVG is put into
_COLUMNS = 3

# By the name in the legend, one history or those of several seeds.
Runs = Mapping[str, Sequence[History]]


def plot_curves(axes: Axes, runs: Runs, key: str, *, against: str = "iteration") -> None:
    """
    A metric of several runs.

    Args:
        axes: where to.
        runs: by the name in the legend; several histories are seeds: their mean, between the least and the largest.
        key: the metric; a run without it is left out.
        against: "iteration" or "hours", see :meth:`History.series`; less than one is shown in minutes.
    """
    series = {name: [history.series(key, against=against) for history in runs[name]] for name in runs}
    longest = max((x[-1] for of_run in series.values() for x, _ in of_run if len(x)), default=0)
    in_minutes = against == "hours" and longest < 1
    for i, (name, of_run) in enumerate(series.items()):
        x, y = align(of_run)
        if not len(x):
            continue
        x = x * (60 if in_minutes else 1)
        style = {"color": COLOURS[i % len(COLOURS)], "marker": "o" if len(x) < 12 else None, "markersize": 3}
        axes.plot(x, y.mean(0), label=name if len(y) == 1 else f"{name} ({len(y)} seeds)", linewidth=1.5, **style)
        if len(y) > 1:
            axes.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.2, linewidth=0)
    axes.set_title(key)
    unit = "minutes" if in_minutes else "hours"
    axes.set_xlabel(f"{unit} of training steps" if against == "hours" else "step")
    if "/" in key:  # a score
        axes.margins(0.1)
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)


def draw_curves(path: str, runs: Runs) -> list[str]:
    """
    The scores against steps and against time, and every loss, into one picture: ``path`` with .png and .svg.

    Returns:
        The two files.
    """
    every = [history for histories in runs.values() for history in histories]
    charts = [(key, against) for key in _merged(every, "scores") for against in ("iteration", "hours")]
    charts += [(key, "iteration") for key in _merged(every, "losses")]
    columns = min(max(len(charts), 1), _COLUMNS)
    rows = max(-(-len(charts) // columns), 1)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "svg.fonttype": "none"}):
        figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.4), layout="constrained", dpi=150)
        places = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in places[len(charts) :]:
            axes.set_axis_off()
        for axes, (key, against) in zip(places, charts):
            plot_curves(axes, runs, key, against=against)
        labels = {label: line for axes in places for line, label in zip(*axes.get_legend_handles_labels())}
        if labels:
            place = {"loc": "outside upper center", "ncols": min(len(labels), columns + 1)}
            figure.legend(labels.values(), labels, frameon=False, **place)
        files = [f"{path}.png", f"{path}.svg"]
        for file in files:
            figure.savefig(file)
    return files


def chart_svg(runs: Runs, key: str, *, against: str = "iteration") -> str:
    """One chart as an SVG element for a page: its text takes the page's font and colour, its ground is clear."""
    return _svg(lambda axes: plot_curves(axes, runs, key, against=against), legend=len(runs) > 1)


def loss_shares_svg(history: History) -> str:
    """What part of the total each loss has over time, as :func:`chart_svg`; losses on a logarithmic scale hide it."""

    def plot(axes: Axes) -> None:
        names = history.losses()
        x, y = align([history.series(name) for name in names])
        shares = y.clip(min=0) / np.maximum(y.clip(min=0).sum(0), 1e-30)
        axes.stackplot(x, shares, labels=names, colors=[*COLOURS, "#F0E442", "#8C564B"], alpha=0.85)
        axes.set_title("share of each loss in the total")
        axes.set_xlabel("step")
        axes.margins(0)

    return _svg(plot, legend=True)


def _svg(plot, *, legend: bool) -> str:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    # With a salt of our own, the names inside depend on what they name alone: one page holds many charts.
    with matplotlib.rc_context({**ink, "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "kd_det"}):
        figure = Figure(figsize=(4.2, 3.0), layout="constrained")
        plot(figure.subplots())
        if legend and figure.axes[0].get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    # Without the file's own description, and the names of groups, which all charts share.
    svg = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"|<metadata>.*?</metadata>', "", file.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _merged(histories: Sequence[History], names: str) -> list[str]:
    return list(dict.fromkeys(key for history in histories for key in getattr(history, names)()))
