"""Tables of results."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

__all__ = ["TABLE_FORMATS", "RunSummary", "comparison_table", "runs_table", "table_cells"]

# By the ending of a file.
TABLE_FORMATS = ("txt", "md", "csv")
_SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "top1", "top5")


@dataclass(frozen=True)
class RunSummary:
    """
    One row of :func:`runs_table`.

    Attributes:
        name: of the run.
        steps: how many it was trained for.
        scores: the last value of each metric of each of its seeds, e.g. {"bbox/AP": [40.1, 39.8]}.
        parameters: of the plain student, None if unknown.
        flops: multiply-adds of the plain student on one image, None if unknown.
        seconds: of a training step, None if unknown.
        weights: of its distillation losses, by name.
    """

    name: str
    steps: int
    scores: Mapping[str, Sequence[float]]
    parameters: int | None = None
    flops: float | None = None
    seconds: float | None = None
    weights: Mapping[str, float] | None = None


def comparison_table(rows: Sequence[tuple[str, int, Mapping[str, float]]]) -> str:
    """A Markdown table of models: name, number of parameters and metrics (see :func:`kd_det.study.read_metrics`)."""
    table = [
        (name, f"{parameters:,}", f"{m.get('time', math.nan):.3f}", f"{m['bbox/AP']:.1f}", f"{m['bbox/AP50']:.1f}")
        for name, parameters, m in rows
    ]
    return _markdown(table, ("model", "parameters", "s / step", "AP", "AP50"))


def table_cells(runs: Sequence[RunSummary]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of :func:`runs_table`."""
    found = dict.fromkeys(key for run in runs for key in run.scores)
    tasks = dict.fromkeys(key.partition("/")[0] for key in found)
    scores = [key for task in tasks for score in _SCORES if (key := f"{task}/{score}") in found]
    headers = ["run", "steps", *(key.removeprefix("bbox/") for key in scores)]
    headers += ["parameters", "GFLOPs", "s / step", "losses"]
    rows = [
        [
            run.name,
            str(run.steps),
            *(_mean_and_spread(run.scores.get(key, ())) for key in scores),
            "-" if run.parameters is None else f"{run.parameters:,}",
            "-" if run.flops is None else f"{run.flops / 1e9:.3g}",
            "-" if run.seconds is None else f"{run.seconds:.3f}",
            ", ".join(f"{name} {weight:g}" for name, weight in (run.weights or {}).items()) or "-",
        ]
        for run in runs
    ]
    return headers, rows


def runs_table(runs: Sequence[RunSummary], form: str = "txt") -> str:
    """
    Runs side by side: scores (of several seeds, mean and standard deviation), size, FLOPs, speed, weights of losses.

    Args:
        runs: the rows.
        form: one of :data:`TABLE_FORMATS`.
    """
    headers, rows = table_cells(runs)
    if form == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([headers, *rows])
        return file.getvalue().rstrip("\n")
    align = ["left", *["right"] * (len(headers) - 2), "left"]
    style = "github" if form == "md" else "simple"
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=align)


def _mean_and_spread(values: Sequence[float]) -> str:
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _markdown(table: list[tuple], headers: tuple[str, ...]) -> str:
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(table, headers, tablefmt="github", disable_numparse=True, colalign=align)
