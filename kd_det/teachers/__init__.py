"""Teachers: from a name or a config to a frozen network, and that network run beside the student."""

from kd_det.teachers.build import build_teacher, build_teacher_architecture, get_teacher_cfg, load_teacher
from kd_det.teachers.ema import EMATeacher, ema_teacher
from kd_det.teachers.ensemble import AveragedTeacher, OtherTeacher, TeacherAverage
from kd_det.teachers.feature_teacher import FeatureTeacher, torchvision_teacher
from kd_det.teachers.runner import Teacher
from kd_det.teachers.sources import TeacherSource, register_teacher_source
from kd_det.teachers.torchvision_detectors import torchvision_detector
from kd_det.teachers.torchvision_source import TorchvisionTeacher
from kd_det.teachers.transformers_detectors import TransformersDetector

__all__ = [
    "AveragedTeacher",
    "EMATeacher",
    "FeatureTeacher",
    "OtherTeacher",
    "Teacher",
    "TeacherAverage",
    "TeacherSource",
    "TorchvisionTeacher",
    "TransformersDetector",
    "build_teacher",
    "build_teacher_architecture",
    "ema_teacher",
    "get_teacher_cfg",
    "load_teacher",
    "register_teacher_source",
    "torchvision_detector",
    "torchvision_teacher",
]
