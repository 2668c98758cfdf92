"""Teachers: from a name or a config to a frozen network, and that network run beside the student."""

from kd_det.teachers.build import build_teacher, build_teacher_architecture, get_teacher_cfg, load_teacher
from kd_det.teachers.feature_teacher import FeatureTeacher, torchvision_teacher
from kd_det.teachers.runner import Teacher

__all__ = [
    "FeatureTeacher",
    "Teacher",
    "build_teacher",
    "build_teacher_architecture",
    "get_teacher_cfg",
    "load_teacher",
    "torchvision_teacher",
]
