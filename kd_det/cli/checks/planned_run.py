"""What the checks know about a run."""

import argparse
import os
from dataclasses import dataclass, field

from detectron2.config import CfgNode
from torch import nn

from kd_det.data import DatasetSummary

__all__ = ["PlannedRun"]


@dataclass
class PlannedRun:
    """
    Attributes:
        cfg: its config.
        args: its command line.
        model: what it trains or evaluates, on the CPU; set by ``check_model``.
        datasets: a summary of each data set, by name; set by ``check_datasets``.
        warnings: what is odd and no error, for the log.
    """

    cfg: CfgNode
    args: argparse.Namespace
    model: nn.Module | None = None
    datasets: dict[str, DatasetSummary] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        return not self.args.eval_only

    @property
    def training_sets(self) -> list[str]:
        return list(self.cfg.DATASETS.TRAIN) if self.trains else []

    @property
    def test_sets(self) -> list[str]:
        return list(self.cfg.DATASETS.TEST)

    @property
    def student(self) -> nn.Module:
        return getattr(self.model, "student", self.model)

    @property
    def num_processes(self) -> int:
        return int(os.environ.get("WORLD_SIZE", self.args.num_gpus * self.args.num_machines))
