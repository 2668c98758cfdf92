"""What the runs of a study gave: kept as JSON in git, and made into tables from there."""

import hashlib
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
from tabulate import tabulate

from kd_det.study.run_config import used_config
from kd_det.study.runs import Run
from kd_det.visualization.history import History, read_history

__all__ = ["Record", "Results", "config_hash", "results_table"]

TEACHER, ALONE = "teacher", "alone"  # the rows between which the gap is


@dataclass(frozen=True)
class Record:
    """
    A finished run.

    Attributes:
        row: what its table calls it.
        seed: its SEED.
        arguments: of the command that ran it.
        config: :func:`config_hash` of its config.
        steps: how many it was trained for.
        seconds: of a training step, their median; 0 where none was logged (Detectron2 does not time the first three).
        scores: "bbox/AP" and the like of every evaluation, as [step, hours of training steps, value] lists; hours are 0
            where no time was logged.
        machine: what it ran on.
    """

    row: str
    seed: int
    arguments: str
    config: str
    steps: int
    seconds: float
    scores: Mapping[str, Sequence[Sequence[float]]]
    machine: str

    @classmethod
    def of(cls, row: str, run: Run) -> "Record":
        """Of a finished run in its folder."""
        history = read_history(run.output_dir)
        seconds = list(history.values.get("time", {}).values())
        # Without those of single classes ("bbox/AP-cat"), which are many, and what training logs ("rpn/num_pos_...").
        scores = {key: [] for key in history.values if re.fullmatch(r"\w+/(AP|top)\w*", key)}
        for key in scores:
            steps, values = history.series(key)
            rounded = zip(steps.tolist(), history.hours(steps).round(4).tolist(), values.round(3).tolist())
            scores[key] = [[int(step), hours if hours > 0 else 0.0, value] for step, hours, value in rounded]
        return cls(
            row=row,
            seed=run.cfg.SEED,
            arguments=" ".join(run.command),
            config=config_hash(run),
            steps=run.cfg.SOLVER.MAX_ITER,
            seconds=round(statistics.median(seconds), 4) if seconds else 0.0,
            scores={key: values for key, values in scores.items() if values},
            machine=_machine(run.cfg.MODEL.DEVICE),
        )

    def last(self, key: str) -> float:
        """The last value of a score, nan without one."""
        return self.scores[key][-1][2] if key in self.scores else math.nan

    def history(self) -> History:
        """Its scores for :func:`kd_det.visualization.plot_curves`, over steps and hours."""
        values = {key: {step: value for step, _, value in curve} for key, curve in self.scores.items()}
        values["time"] = dict.fromkeys(range(0, self.steps, max(self.steps // 20, 1)), self.seconds)
        return History(values)


def config_hash(run: Run) -> str:
    """Of what the run uses of its config, wherever it writes to and whatever it runs on, which the record tells."""
    cfg = used_config(run.cfg)
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.KD.IMPORTS, cfg.MODEL.DEVICE = "", [], "cpu"
    return hashlib.sha1(cfg.dump().encode()).hexdigest()[:12]


def _machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {os.environ.get('OMP_NUM_THREADS')}"
    thread = "" if device.startswith("cuda") else " thread(s)"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "detectron2", "kd_det"))
    return f"{name}{thread}, Python {platform.python_version()}, {versions}"


class Results:
    """The records of a study in a JSON file, one a line, in the order of row and seed."""

    def __init__(self, path: str):
        """``path``: the file, which need not exist yet."""
        self.path = path
        self.records = self._read()

    def _read(self) -> list[Record]:
        if not os.path.isfile(self.path):
            return []
        with open(self.path) as file:
            return [Record(**record) for record in json.load(file)]

    def find(self, row: str, run: Run) -> Record | None:
        """The record of this run with this config, None without one."""
        wanted = row, run.cfg.SEED, config_hash(run)
        return next((r for r in self.records if (r.row, r.seed, r.config) == wanted), None)

    def add(self, record: Record, rows: Sequence[str]) -> None:
        """Add a record, or replace that of the same row and seed, and write the file; ``rows``: their order."""
        # Read again: another process may work on other rows.
        kept = [r for r in self._read() if (r.row, r.seed) != (record.row, record.seed)] + [record]
        places = {row: place for place, row in enumerate(rows)}
        self.records = sorted(kept, key=lambda r: (places.get(r.row, len(places)), r.row, r.seed))
        text = ",\n".join(json.dumps(asdict(r)) for r in self.records)
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        with open(f"{self.path}.new", "w") as file:
            file.write(f"[\n{text}\n]\n")
        os.replace(f"{self.path}.new", self.path)


def results_table(records: Iterable[Record], *, metric: str = "bbox/AP", form: str = "github") -> str:
    """
    A row each: mean and standard error over seeds, how far from the row "alone", and what part of the gap from "alone"
    to "teacher" is recovered. Runs of one seed share their random weights and the order of images: the gain is the mean
    of the differences at the same seed, with the standard error of that mean.

    Args:
        records: of all rows, in order.
        metric: whose row means and gap are shown; two more of its task stand beside it, e.g. AP50 and AP75.
        form: of ``tabulate``.
    """
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record.row, []).append(record)
    task = metric.partition("/")[0]
    others = [f"{task}/{name}" for name in ("AP50", "AP75", "top5") if f"{task}/{name}" != metric]
    others = [key for key in others if any(key in r.scores for group in rows.values() for r in group)]
    alone, teacher = (rows.get(name) for name in (ALONE, TEACHER))
    gap = _gain(teacher, alone, metric)[0] if teacher and alone else 0.0
    table = []
    for name, group in rows.items():
        line = [name, len(group), _with_error(*mean_and_error([r.last(metric) for r in group]))]
        line += [f"{mean_and_error([r.last(key) for r in group])[0]:.1f}" for key in others]
        if alone:
            gain, error = _gain(group, alone, metric)
            line.append("" if name == ALONE else _with_error(gain, error, sign="+"))
            if teacher:
                line.append("" if name in (ALONE, TEACHER) or not gap > 0 else f"{100 * gain / gap:.0f}%")
        table.append([*line, group[0].steps])
    headers = ["run", "seeds", metric.partition("/")[2], *(key.partition("/")[2] for key in others)]
    headers += ["gain"] * bool(alone) + ["of the gap"] * bool(alone and teacher) + ["steps"]
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(table, headers, tablefmt=form, disable_numparse=True, colalign=align)


def _gain(group: Sequence[Record], alone: Sequence[Record], metric: str) -> tuple[float, float]:
    """The mean difference at the seeds that both have, with its standard error; without any, that of the means."""
    starts = {record.seed: record.last(metric) for record in alone}
    if differences := [record.last(metric) - starts[record.seed] for record in group if record.seed in starts]:
        return mean_and_error(differences)
    (end, end_error), (start, start_error) = (mean_and_error([r.last(metric) for r in rows]) for rows in (group, alone))
    return end - start, math.hypot(end_error, start_error)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, nan for one value."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def _with_error(value: float, error: float, sign: str = "") -> str:
    return f"{value:{sign}.1f}" + (f" ± {error:.1f}" if math.isfinite(error) else "")
