"""What a run left in its folder, read again: its config, metrics, log and weights."""

import functools
import os
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

from kd_det.cli.arguments import config_parser, parse_arguments
from kd_det.cli.networks import LazyNetworks, YamlNetworks, open_networks
from kd_det.errors import UserError, one_line
from kd_det.visualization.history import History, read_history
from kd_det.visualization.tables import RunSummary

__all__ = ["RunFolder", "open_runs", "summarize"]


@dataclass(frozen=True)
class RunFolder:
    path: str

    @functools.cached_property
    def networks(self) -> YamlNetworks | LazyNetworks:
        """Its config's; ``ValueError`` or ``OSError`` for a file that is not there or not a config of kd_det."""
        argv = ["--config-file", os.path.join(self.path, "config.yaml")]
        return open_networks(parse_arguments(config_parser(""), argv))

    @functools.cached_property
    def history(self) -> History:
        return read_history(self.path)

    @property
    def weights(self) -> str:
        return os.path.join(self.path, "model_final.pth")

    @property
    def steps(self) -> int:
        """How many steps its metrics tell of."""
        return 1 + max((i for key in ("time", "total_loss") for i in self.history.values.get(key, ())), default=-1)

    @functools.cached_property
    def log(self) -> str:
        """Its log.txt, empty without one."""
        path = os.path.join(self.path, "log.txt")
        if not os.path.isfile(path):
            return ""
        with open(path, errors="replace") as file:
            return file.read()

    def logged(self, pattern: str) -> str:
        """What the group of a pattern last matched in the log, empty without."""
        found = re.findall(pattern, self.log, re.MULTILINE)
        return found[-1] if found else ""


def open_runs(specs: Iterable[str]) -> dict[str, list[RunFolder]]:
    """
    Runs by name.

    Args:
        specs: "FOLDER", called by the folder's name, or "NAME=FOLDER,FOLDER": seeds of one run.

    Raises:
        UserError: a folder without metrics.json, or two runs of one name.
    """
    ret: dict[str, list[RunFolder]] = {}
    for spec in specs:
        name, _, folders = spec.rpartition("=")
        runs = [RunFolder(folder) for folder in folders.split(",")]
        for run in runs:
            if not run.history.values:
                raise UserError(f"{run.path} holds no run: expected a folder with a metrics.json")
        name = name or os.path.basename(os.path.abspath(folders))
        if name in ret:
            raise UserError(f"two runs are named {name!r}: name them, as in alone={folders}")
        ret[name] = runs
    return ret


def summarize(name: str, runs: list[RunFolder]) -> RunSummary:
    """The row of a run, or of its seeds, in a table."""
    scores: dict[str, list[float]] = {}
    for run in runs:
        for key, value in run.history.last().items():
            if "/" in key:
                scores.setdefault(key, []).append(value)
    times = [value for run in runs for value in run.history.values.get("time", {}).values()]
    size, weights = (None, None), {}
    try:
        networks = runs[0].networks
        weights = networks.loss_weights(runs[0].history)
        size = _size(networks)
    except (KeyError, OSError, RuntimeError, ValueError) as e:  # no config, no project, no way to count
        print(f"{name}: its row is left incomplete: {one_line(e)}")
    steps, seconds = max(run.steps for run in runs), statistics.median(times) if times else None
    return RunSummary(name, steps, scores, *size, seconds=seconds, weights=weights)


_sizes: dict[str, tuple[int, float]] = {}


def _size(networks: YamlNetworks | LazyNetworks) -> tuple[int, float]:
    """Parameters and FLOPs of the plain student, counted once for all runs of one student."""
    key = networks.student_key()
    if key not in _sizes:
        model = networks.build_student()
        _sizes[key] = sum(p.numel() for p in model.parameters()), count_flops(model, networks.image_size())
    return _sizes[key]


@torch.no_grad()
def count_flops(model: nn.Module, size: tuple[int, int]) -> float:
    """
    Multiply-adds of a detector on one image of noise, as fvcore counts them. A box head runs on as many proposals as
    there are, at an untrained network nearly the most that the config lets through.
    """
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 255
    counts = FlopCountAnalysis(model, [{"image": image}])
    return float(counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())
