"""Detectron2's training engine for distillation: the trainer, its step, its loader, evaluation and stopping."""

from kd_det.engine.loader import ResumableLoader, build_train_loader
from kd_det.engine.stopping import RESUMABLE
from kd_det.engine.trainer import Trainer, evaluate

__all__ = ["RESUMABLE", "ResumableLoader", "Trainer", "build_train_loader", "evaluate"]
