"""Detectron2's ``DefaultTrainer`` with evaluators, on any number of processes with or without GPUs."""

import logging
import os
import weakref

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.engine.train_loop import SimpleTrainer, TrainerBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_det.checkpoint import SafeCheckpointer, load_strictly
from kd_det.errors import unknown_name
from kd_det.random_state import preserved_random_state

__all__ = ["EVALUATORS", "Trainer", "evaluate"]

logger = logging.getLogger(__name__)

# By the ``evaluator_type`` of a data set's metadata.
EVALUATORS = {
    "coco": lambda name, output_dir: COCOEvaluator(name, output_dir=output_dir),
    "pascal_voc": lambda name, output_dir: PascalVOCDetectionEvaluator(name),
}


class Trainer(DefaultTrainer):
    """
    Trains what ``build_model`` builds, a Distiller or a plain model, and evaluates it on ``DATASETS.TEST``. Override
    ``build_train_loader``, ``build_evaluator`` and the other class methods as those of ``DefaultTrainer``.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = _distributed(model)
        self._trainer = SimpleTrainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """
        The evaluator of the data set's ``evaluator_type``.

        Raises:
            ValueError: no evaluator of that type.
        """
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
        if kind not in EVALUATORS:
            raise ValueError(f"data set {dataset_name!r}: {unknown_name('evaluator_type', kind, EVALUATORS)}")
        return EVALUATORS[kind](dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None):
        """As ``DefaultTrainer.test``; what it draws at random does not shift training."""
        with preserved_random_state():
            return super().test(cfg, model, evaluators)


def evaluate(cfg: CfgNode, trainer_class=Trainer, *, resume: bool = False):
    """
    Evaluate the plain student of a config on ``DATASETS.TEST``. No teacher is read.

    Args:
        cfg: a distillation config or a plain one.
        trainer_class: has ``build_model`` and ``test``.
        resume: evaluate the latest checkpoint of ``OUTPUT_DIR`` instead of ``MODEL.WEIGHTS``.

    Returns:
        Results as ``DefaultTrainer.test`` gives them.

    Raises:
        FileNotFoundError, ValueError: weights that do not exist or do not fit.
    """
    model = trainer_class.build_model(cfg)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR)
    weights = cfg.MODEL.WEIGHTS
    if resume and checkpointer.has_checkpoint():
        weights = checkpointer.get_checkpoint_file()
    load_strictly(model, weights, who="student")
    return trainer_class.test(cfg, model)


def _distributed(model: nn.Module) -> nn.Module:
    """Detectron2's ``create_ddp_model``, which gives CPU models a device number."""
    if comm.get_world_size() == 1:
        return model
    devices = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
