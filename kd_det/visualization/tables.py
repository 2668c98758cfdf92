"""Tables of results, from what Detectron2's writers left in a run's ``metrics.json``."""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence

from tabulate import tabulate

__all__ = ["comparison_table", "read_metrics", "seeds_table"]


def read_metrics(output_dir: str) -> dict[str, float]:
    """
    The last evaluation of a finished run and its speed.

    Args:
        output_dir: ``OUTPUT_DIR`` of the run.

    Returns:
        The last value of every ``bbox/...`` key (AP in percent), and ``time``, the median of the seconds a training
        step took (Detectron2 leaves out the first three). Empty if there is no evaluation.
    """
    path = os.path.join(output_dir, "metrics.json")
    if not os.path.isfile(path):
        return {}
    lines = []
    with open(path) as f:
        for line in f:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                pass  # the line that a kill cut off
    ret = {key: value for line in lines for key, value in line.items() if key.startswith("bbox/")}
    times = [line["time"] for line in lines if "time" in line]
    if ret and times:
        ret["time"] = statistics.median(times)
    return ret


def comparison_table(rows: Sequence[tuple[str, int, Mapping[str, float]]]) -> str:
    """
    A Markdown table of models.

    Args:
        rows: name, number of parameters and metrics (see :func:`read_metrics`) of each.
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
