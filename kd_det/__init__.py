"""
Knowledge distillation for Detectron2.

Importing this registers the ``Distiller`` and ``ImageClassifier`` meta-architectures and the losses in their
registries. It changes no default of Detectron2, registers no data set and reads no file.
"""

import kd_det.classification.gradient_attention  # noqa: F401  registers GradientAttentionLoss
import kd_det.classification.networks  # noqa: F401  registers ImageClassifier and NetworkClassifier
from kd_det.config import add_kd_config, add_loss_config
from kd_det.distiller import Distiller
from kd_det.features.taps import Taps
from kd_det.losses import DISTILLATION_LOSS_REGISTRY, DistillationLoss
from kd_det.student import build_student, student_cfg
from kd_det.teachers import build_teacher, build_teacher_architecture

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
