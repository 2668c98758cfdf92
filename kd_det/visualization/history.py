"""What a run wrote into metrics.json, as series over steps and over time."""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["History", "read_history"]


@dataclass(frozen=True)
class History:
    """
    Attributes:
        values: by metric, such as "loss_nst" or "bbox/AP", its value by iteration, in order.
    """

    values: dict[str, dict[int, float]]

    def series(self, key: str, *, against: str = "iteration") -> tuple[np.ndarray, np.ndarray]:
        """
        A metric where it is finite; empty for one that the run does not have.

        Args:
            key: the metric.
            against: "iteration", or "hours": the time of all training steps before, without evaluations.
        """
        pairs = [(i, v) for i, v in self.values.get(key, {}).items() if np.isfinite(v)]
        x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
        return (self.hours(x) if against == "hours" else x), y

    def hours(self, iterations: np.ndarray) -> np.ndarray:
        ends, seconds = self.series("time")  # of a step, the median of those since the line before
        if not len(ends):
            return np.full(len(iterations), np.nan)
        spent = np.cumsum(seconds * np.diff(ends, prepend=-1.0)) / 3600
        return np.interp(iterations, np.append(-1.0, ends), np.append(0.0, spent))

    def last(self) -> dict[str, float]:
        """The last value of every metric."""
        return {key: list(values.values())[-1] for key, values in self.values.items()}

    def losses(self) -> list[str]:
        """The names of all losses, the student's own and those of distillation."""
        return sorted(key for key in self.values if re.match(r"(?!total_).*loss", key))

    def scores(self) -> list[str]:
        """The main metric of each evaluated task: "bbox/AP", "segm/AP", ..."""
        return [key for key in self.values if re.fullmatch(r"\w+/(AP|top1)", key)]


def read_history(output_dir: str) -> History:
    """
    The metrics of a run; of a step that was trained twice, because a run was killed and resumed, the last ones. Empty
    without a metrics.json.
    """
    path = os.path.join(output_dir, "metrics.json")
    values: dict[str, dict[int, float]] = {}
    for line in Path(path).read_text().splitlines() if os.path.isfile(path) else ():
        with contextlib.suppress(json.JSONDecodeError):  # the line that a kill cut off
            record = json.loads(line)
            for key in record.keys() - {"iteration"}:
                values.setdefault(key, {})[record.get("iteration", 0)] = record[key]
    return History({key: dict(sorted(values[key].items())) for key in sorted(values)})


def align(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Several series (x, y) on the x of all of them, as far as each reaches: x (P,) and y (series, P)."""
    series = [(x, y) for x, y in series if len(x)]
    if not series:
        return np.empty(0), np.empty((0, 0))
    x = np.unique(np.concatenate([x for x, _ in series]))
    x = x[(x >= max(own[0] for own, _ in series)) & (x <= min(own[-1] for own, _ in series))]
    return x, np.stack([np.interp(x, *one) for one in series])
