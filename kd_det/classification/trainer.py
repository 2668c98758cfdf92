"""The trainer of the pretraining stage: kd_det's, with classes, an average of the weights and a backbone file."""

import contextlib
import functools
import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from kd_det.classification.average import AverageStatistics, WeightAverage
from kd_det.classification.classifier import ImageClassifier
from kd_det.classification.evaluator import ClassificationEvaluator
from kd_det.classification.loader import build_test_loader, build_train_loader
from kd_det.engine.trainer import EVALUATORS, Trainer
from kd_det.errors import UserError
from kd_det.student import student_class
from kd_det.weights.backbone_file import backbone_metadata, backbone_weights, save_backbone
from kd_det.weights.files import write_aside

__all__ = ["AVERAGE_FILE", "BACKBONE_FILE", "ClassificationTrainer", "check_trainer", "is_classifier", "trainer_class"]

logger = logging.getLogger(__name__)

BACKBONE_FILE = "backbone.pkl"
AVERAGE_FILE = "model_ema.pth"

EVALUATORS["classification"] = lambda cfg, name, output_dir: ClassificationEvaluator()


class ClassificationTrainer(Trainer):
    """
    Trains an ``ImageClassifier``, plain or as a Distiller's student. With ``CLASSIFICATION.EMA_DECAY``, the average of
    the weights is what is evaluated and exported; checkpoints hold both, and at the end ``OUTPUT_DIR/model_ema.pth`` is
    a classifier of the average (for ``--eval-only``, or to teach). Then the backbone is in ``OUTPUT_DIR/backbone.pkl``.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        if self.average is not None:
            self.checkpointer.add_checkpointable("ema", self.average)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

    def build_hooks(self):
        # DefaultTrainer's __init__ calls this with the model built and nothing loaded.
        decay = self.cfg.CLASSIFICATION.EMA_DECAY
        self.average = WeightAverage(_plain(self.model), decay) if decay else None
        ret = [self._evaluation() if isinstance(hook, hooks.EvalHook) else hook for hook in super().build_hooks()]
        averaging = [hooks.CallbackHook(after_step=lambda trainer: trainer.average.update())] if decay else []
        # Before the checkpointer, so that a checkpoint holds the averages of its own weights.
        return [AverageStatistics(), *averaging, *ret, _ExportBackbone()]

    def _evaluation(self) -> hooks.EvalHook:
        """Evaluates the average, if one is kept; one loader a data set serves all evaluations, with its workers."""
        loader = functools.cache(functools.partial(self.build_test_loader, self.cfg))

        class Evaluated(type(self)):  # DefaultTrainer.test calls class methods
            @classmethod
            def build_test_loader(cls, cfg, dataset_name):
                return loader(dataset_name)

        def evaluate():
            with self.averaged():
                self._last_eval_results = Evaluated.test(self.cfg, self.model)
            return self._last_eval_results

        return hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, evaluate)

    def averaged(self):
        """A context in which the model's weights are their average, if one is kept."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()


class _ExportBackbone(HookBase):
    def after_train(self):
        trainer = self.trainer
        if trainer.iter + 1 < trainer.max_iter or not comm.is_main_process():
            return
        path = os.path.join(trainer.cfg.OUTPUT_DIR, BACKBONE_FILE)
        with trainer.averaged():
            model = _plain(trainer.model)
            save_backbone(path, backbone_weights(model), backbone_metadata(trainer.cfg))
            if trainer.average is not None:
                average = os.path.join(trainer.cfg.OUTPUT_DIR, AVERAGE_FILE)
                write_aside(average, lambda file: torch.save({"model": model.state_dict()}, file))
        logger.info(f"Backbone for detectors: {path}. They must give it such images: {backbone_metadata(trainer.cfg)}")


def is_classifier(cfg: CfgNode) -> bool:
    """Whether the student of a config is an ``ImageClassifier`` or made from it."""
    student = student_class(cfg)
    return isinstance(student, type) and issubclass(student, ImageClassifier)


def trainer_class(cfg: CfgNode) -> type[Trainer]:
    """The trainer of a config: this stage's if the student is a classifier, kd_det's otherwise."""
    return ClassificationTrainer if is_classifier(cfg) else Trainer


def check_trainer(cfg: CfgNode, trainer: type[Trainer]) -> None:
    """Raise a :class:`UserError`, which names the tool, if the config is one of the other stage's than the trainer."""
    classifies = issubclass(trainer, ClassificationTrainer)
    if classifies != is_classifier(cfg):
        tool = "train_net.py" if classifies else "pretrain_backbone.py"
        raise UserError(f"the config is of {student_class(cfg).__name__}, which is for tools/{tool}")


def _plain(model: nn.Module) -> nn.Module:
    """What is inside DDP and a Distiller."""
    model = getattr(model, "module", model)
    return getattr(model, "student", model)
