"""
Knowledge distillation for Detectron2.

Importing this registers the ``Distiller`` meta-architecture, the losses and the offline data sets in Detectron2's
registries. It changes no default of Detectron2 and reads no file.
"""

import kd_det.classification  # noqa: F401  registers ImageClassifier and the classification data sets
import kd_det.data  # noqa: F401  registers the offline data sets
from kd_det.config import add_kd_config, add_loss_config
from kd_det.distiller import Distiller, build_student, student_cfg
from kd_det.losses import DISTILLATION_LOSS_REGISTRY, DistillationLoss
from kd_det.taps import Taps
from kd_det.teacher import build_teacher, build_teacher_architecture

__version__ = "0.1.0"

__all__ = [
    "DISTILLATION_LOSS_REGISTRY",
    "DistillationLoss",
    "Distiller",
    "Taps",
    "add_kd_config",
    "add_loss_config",
    "build_student",
    "build_teacher",
    "build_teacher_architecture",
    "student_cfg",
]
