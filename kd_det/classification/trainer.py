"""The trainer of the pretraining stage: kd_det's, with classes, an average of the weights and a backbone file."""

import functools
import logging
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch import nn

from kd_det.classification.backbone_only import BackboneOnly
from kd_det.classification.evaluator import ClassificationEvaluator
from kd_det.classification.loader import build_test_loader, build_train_loader
from kd_det.classification.probe import FeatureCollector, ProbeEvaluator
from kd_det.engine.average import AVERAGE_FILE, AverageStatistics, plain_model
from kd_det.engine.trainer import EVALUATORS, Trainer
from kd_det.errors import UserError
from kd_det.random_state import preserved_random_state
from kd_det.student import student_class
from kd_det.weights.backbone_file import backbone_metadata, backbone_weights, save_backbone

__all__ = ["AVERAGE_FILE", "BACKBONE_FILE", "ClassificationTrainer", "check_trainer", "is_classifier", "trainer_class"]

logger = logging.getLogger(__name__)

BACKBONE_FILE = "backbone.pkl"

EVALUATORS["classification"] = lambda cfg, name, output_dir: ClassificationEvaluator()


class ClassificationTrainer(Trainer):
    """
    Trains an ``ImageClassifier``, plain or as a Distiller's student, or a ``BackboneOnly`` as one. At the end, the
    backbone, of the average where one is kept (``CLASSIFICATION.EMA_DECAY`` or ``KD.EMA_DECAY``), is in
    ``OUTPUT_DIR/backbone.pkl``.
    """

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def ema_decay(cls, cfg: CfgNode) -> float:
        return cfg.CLASSIFICATION.EMA_DECAY or super().ema_decay(cfg)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None):
        """As ``DefaultTrainer.test``; the evaluators of a backbone without a head are k-NN and a linear probe."""
        if evaluators is None and cfg.DATASETS.TEST and not plain_model(model).needs_labels:
            probe = cfg.CLASSIFICATION.PROBE
            with preserved_random_state():  # PyTorch draws a seed for its workers
                known = inference_on_dataset(model, cls.build_test_loader(cfg, probe.TRAIN), FeatureCollector())
            classes = len(MetadataCatalog.get(probe.TRAIN).classes)
            evaluators = [ProbeEvaluator(known, classes, neighbours=probe.NEIGHBOURS) for _ in cfg.DATASETS.TEST]
        return super().test(cfg, model, evaluators)

    def build_hooks(self):
        ret = super().build_hooks()
        return [*([] if self.average is not None else [AverageStatistics()]), *ret, _ExportBackbone()]

    @functools.cached_property
    def _tester(self):
        """One loader a data set serves all evaluations, with its workers."""
        loader = functools.cache(functools.partial(self.build_test_loader, self.cfg))

        class Evaluated(type(self)):  # DefaultTrainer.test calls class methods
            @classmethod
            def build_test_loader(cls, cfg, dataset_name):
                return loader(dataset_name)

        return Evaluated


class _ExportBackbone(HookBase):
    def after_train(self):
        trainer = self.trainer
        if trainer.iter + 1 < trainer.max_iter or not comm.is_main_process():
            return
        path = os.path.join(trainer.cfg.OUTPUT_DIR, BACKBONE_FILE)
        with trainer.averaged():
            save_backbone(path, backbone_weights(plain_model(trainer.model)), backbone_metadata(trainer.cfg))
        logger.info(f"Backbone for detectors: {path}. They must give it such images: {backbone_metadata(trainer.cfg)}")


def is_classifier(cfg: CfgNode) -> bool:
    """Whether the student of a config is of this stage: a ``BackboneOnly``, such as an ``ImageClassifier``."""
    student = student_class(cfg)
    return isinstance(student, type) and issubclass(student, BackboneOnly)


def trainer_class(cfg: CfgNode) -> type[Trainer]:
    """The trainer of a config: this stage's if the student is of it, kd_det's otherwise."""
    return ClassificationTrainer if is_classifier(cfg) else Trainer


def check_trainer(cfg: CfgNode, trainer: type[Trainer]) -> None:
    """Raise a :class:`UserError`, which names the tool, if the config is one of the other stage's than the trainer."""
    classifies = issubclass(trainer, ClassificationTrainer)
    if classifies != is_classifier(cfg):
        tool = "train_net.py" if classifies else "pretrain_backbone.py"
        raise UserError(f"the config is of {student_class(cfg).__name__}, which is for tools/{tool}")
