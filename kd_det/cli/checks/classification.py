"""The input and the folders of the pretraining stage."""

from kd_det.classification import checks
from kd_det.classification.data import check_classes
from kd_det.cli.checks.planned_run import PlannedRun

__all__ = ["check_folders", "check_input"]


def check_input(run: PlannedRun) -> None:
    checks.check_input(run.cfg)


def check_folders(run: PlannedRun) -> None:
    check_classes(run.cfg, run.training_sets + run.test_sets)
