"""Hooks of a run that keeps an average of its student's weights."""

import logging
import os

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from kd_det.weights.average import average_statistics
from kd_det.weights.files import write_aside

__all__ = ["AVERAGE_FILE", "AverageStatistics", "AverageWeights", "plain_model"]

logger = logging.getLogger(__name__)

AVERAGE_FILE = "model_ema.pth"


class AverageStatistics(HookBase):
    """
    Averages batch-norm statistics over the processes after every step (running averages are linear, so nothing else
    changes). The model that all processes evaluate is then the one that the first process saves.
    """

    def after_step(self):
        average_statistics(self.trainer.model)


class AverageWeights(HookBase):
    """
    Updates ``trainer.average`` after every step that was not skipped (KD.NON_FINITE); at the end of the run,
    ``OUTPUT_DIR/model_ema.pth`` is a plain student of the averaged weights.
    """

    def before_step(self):
        self._skipped = self.trainer.non_finite_steps

    def after_step(self):
        if self.trainer.non_finite_steps == self._skipped:
            self.trainer.average.update()

    def after_train(self):
        trainer = self.trainer
        if trainer.iter + 1 < trainer.max_iter or not comm.is_main_process():
            return
        path = os.path.join(trainer.cfg.OUTPUT_DIR, AVERAGE_FILE)
        with trainer.averaged():
            state = plain_model(trainer.model).state_dict()
            write_aside(path, lambda file: torch.save({"model": state}, file))
        logger.info(f"The average of the student's weights (EMA): {path}, a plain student.")


def plain_model(model: nn.Module) -> nn.Module:
    """What is inside DDP and a Distiller."""
    model = getattr(model, "module", model)
    return getattr(model, "student", model)
