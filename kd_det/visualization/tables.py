"""Tables of results, in Markdown."""

import math
import statistics
from collections.abc import Mapping, Sequence

from tabulate import tabulate

__all__ = ["comparison_table", "seeds_table"]


def comparison_table(rows: Sequence[tuple[str, int, Mapping[str, float]]]) -> str:
    """A Markdown table of models: name, number of parameters and metrics (see :func:`kd_det.study.read_metrics`)."""
    table = [
        (name, f"{parameters:,}", f"{m.get('time', math.nan):.3f}", f"{m['bbox/AP']:.1f}", f"{m['bbox/AP50']:.1f}")
        for name, parameters, m in rows
    ]
    return _markdown(table, ("model", "parameters", "s / step", "AP", "AP50"))


def seeds_table(names: tuple[str, str], results: Mapping[int, tuple[float, float]]) -> str:
    """A Markdown table of two models' AP by seed, the second minus the first, and the means."""
    rows = [(str(seed), *pair, pair[1] - pair[0]) for seed, pair in results.items()]
    if len(rows) > 1:
        rows.append(("mean", *(statistics.mean(column) for column in list(zip(*rows))[1:])))
    table = [(seed, f"{a:.1f}", f"{b:.1f}", f"{gain:+.1f}") for seed, a, b, gain in rows]
    return _markdown(table, ("seed", *(f"AP {name}" for name in names), "difference"))


def _markdown(table: list[tuple], headers: tuple[str, ...]) -> str:
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(table, headers, tablefmt="github", disable_numparse=True, colalign=align)
