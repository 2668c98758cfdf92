"""The trainer of the pretraining stage: kd_det's, with classes, an average of the weights and a backbone file."""

import contextlib
import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from kd_det.classification.average import AverageWeights, WeightAverage
from kd_det.classification.classifier import ImageClassifier
from kd_det.classification.evaluator import ClassificationEvaluator
from kd_det.classification.loader import build_test_loader, build_train_loader
from kd_det.engine.trainer import EVALUATORS, Trainer
from kd_det.errors import UserError
from kd_det.student import student_class
from kd_det.weights.convert import backbone_metadata, backbone_weights, save_backbone

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
        ret = super().build_hooks()
        if self.average is not None:
            # Before the checkpointer, so that a checkpoint holds the average of its own weights.
            ret.insert(0, AverageWeights(self.average))
            ret = [_Evaluation(self) if isinstance(hook, hooks.EvalHook) else hook for hook in ret]
        return [*ret, _ExportBackbone()]

    def averaged(self):
        """Inside this context, the model's weights are their average, if one is kept."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()


class _Evaluation(hooks.EvalHook):
    def __init__(self, trainer: ClassificationTrainer):
        def evaluate():
            with trainer.averaged():
                trainer._last_eval_results = trainer.test(trainer.cfg, trainer.model)
            return trainer._last_eval_results

        super().__init__(trainer.cfg.TEST.EVAL_PERIOD, evaluate)


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
                torch.save({"model": model.state_dict()}, os.path.join(trainer.cfg.OUTPUT_DIR, AVERAGE_FILE))
        logger.info(f"Backbone for detectors: {path}. It wants their images so: {backbone_metadata(trainer.cfg)}")


def is_classifier(cfg: CfgNode) -> bool:
    """Whether the student of a config is an ``ImageClassifier`` or made from it."""
    student = student_class(cfg)
    return isinstance(student, type) and issubclass(student, ImageClassifier)


def trainer_class(cfg: CfgNode) -> type[Trainer]:
    """The trainer of a config: this stage's if the student is a classifier, kd_det's otherwise."""
    return ClassificationTrainer if is_classifier(cfg) else Trainer


def check_trainer(cfg: CfgNode, trainer: type[Trainer]) -> None:
    """
    Raises:
        UserError: the config is one of the other stage's than the trainer; names the tool for it.
    """
    classifies = issubclass(trainer, ClassificationTrainer)
    if classifies != issubclass(trainer_class(cfg), ClassificationTrainer):
        architecture = student_class(cfg).__name__
        tool = "train_net.py" if classifies else "pretrain_backbone.py"
        raise UserError(f"the config is of {architecture}, which is for tools/{tool}")


def _plain(model: nn.Module) -> nn.Module:
    """What is inside DDP and a Distiller."""
    model = getattr(model, "module", model)
    return getattr(model, "student", model)
