"""Tables of results."""

import math
import statistics
from collections.abc import Mapping, Sequence

from tabulate import tabulate

__all__ = ["comparison_table", "seeds_table"]


def comparison_table(rows: Sequence[tuple[str, int, Mapping[str, float]]]) -> str:
    """
    A Markdown table of models.

    Args:
        rows: name, number of parameters and metrics (see :func:`kd_det.engine.read_metrics`) of each.
    """
    table = [
        (name, f"{parameters:,}", f"{m.get('time', math.nan):.3f}", f"{m['bbox/AP']:.1f}", f"{m['bbox/AP50']:.1f}")
        for name, parameters, m in rows
    ]
    headers = ("model", "parameters", "s / step", "AP", "AP50")
    return tabulate(table, headers, tablefmt="github", disable_numparse=True, colalign=("left",) + ("right",) * 4)


def seeds_table(names: tuple[str, str], results: Mapping[int, tuple[float, float]]) -> str:
    """
    A Markdown table of two models trained with the same seeds, the second minus the first, and the means.

    Args:
        names: of the models.
        results: AP of both, by seed.
    """
    rows = [(str(seed), *pair, pair[1] - pair[0]) for seed, pair in results.items()]
    if len(rows) > 1:
        rows.append(("mean", *(statistics.mean(column) for column in list(zip(*rows))[1:])))
    table = [(seed, f"{a:.1f}", f"{b:.1f}", f"{gain:+.1f}") for seed, a, b, gain in rows]
    headers = ("seed", *(f"AP {name}" for name in names), "difference")
    return tabulate(table, headers, tablefmt="github", disable_numparse=True, colalign=("left",) + ("right",) * 3)
