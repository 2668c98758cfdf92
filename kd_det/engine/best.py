"""The best student of a run, by a number of its evaluations."""

import logging
import math
import os
from collections.abc import Mapping

import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.file_io import PathManager
from torch import nn

from kd_det.errors import unknown_name
from kd_det.weights.files import read_checkpoint, write_aside

__all__ = ["BEST_FILE", "BestStudent"]

logger = logging.getLogger(__name__)

BEST_FILE = "model_best.pth"


class BestStudent:
    """
    Keeps ``model_best.pth``, a plain student with the metric, its value and the iteration. The file itself is what a
    resumed run knows of the evaluations before: a step that is trained again gives no better value.

    Detectron2's ``BestCheckpointer`` would save the whole Distiller instead of the evaluated weights (an average, with
    ``KD.EMA_DECAY``), begin anew in a resumed run, and make the best checkpoint the one to resume from.
    """

    def __init__(self, folder: str, metric: str):
        """
        Args:
            folder: OUTPUT_DIR.
            metric: a number of the evaluation that is better when larger, such as "segm/AP"; empty: its first.
        """
        self.path = os.path.join(folder, BEST_FILE)
        self._metric = metric
        self._best = -math.inf

    def resume(self) -> None:
        """Continue from the file, if it is there; ``ValueError`` if it is damaged."""
        if PathManager.isfile(self.path):
            found = read_checkpoint(self.path)
            if self._metric in ("", found["metric"]):
                self._best = found["value"]

    def update(self, results: Mapping, student: nn.Module, iteration: int) -> None:
        """Save the student if its results are better than those before; the main process calls it."""
        numbers = flatten_results_dict(results)
        metric = self._metric or next(iter(numbers), "")
        value = float(numbers.get(metric, math.nan))
        if numbers and metric not in numbers:
            logger.warning(f"No best checkpoint is kept: {unknown_name('KD.BEST_METRIC', metric, numbers)}")
        elif value > self._best:  # false for NaN, of a class without ground truth
            self._best = value
            content = {"model": student.state_dict(), "metric": metric, "value": value, "iteration": iteration}
            write_aside(self.path, lambda file: torch.save(content, file))
            logger.info(f"The best student so far, {metric} {value:.2f}: {self.path}")
