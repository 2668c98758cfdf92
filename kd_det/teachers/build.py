"""The teacher, built from its own config, checked to the last weight, and frozen."""

import logging
from pathlib import Path
from typing import Optional

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager
from torch import nn

from kd_det.compat import model_zoo
from kd_det.config import add_kd_config
from kd_det.config_file import add_missing_keys, merge_config_file, merge_options
from kd_det.errors import unknown_name
from kd_det.student import student_class
from kd_det.teachers.ema import ema_teacher
from kd_det.teachers.feature_teacher import configure_feature_teacher
from kd_det.teachers.networks import NETWORK_SOURCES
from kd_det.weights.strict import load_strictly

__all__ = ["OWN_AVERAGE", "build_teacher", "build_teacher_architecture", "get_teacher_cfg", "load_teacher"]

logger = logging.getLogger(__name__)

# As KD.TEACHER.CONFIG_FILE: the student's own average, see kd_det.teachers.ema.
OWN_AVERAGE = "ema"


def get_teacher_cfg(cfg: CfgNode) -> CfgNode:
    """
    The teacher's own config: ``KD.TEACHER.CONFIG_FILE`` (a file, a model-zoo name, or the name of a network of
    torchvision or timm), its weights, its options, on the student's device. Keys that neither Detectron2 nor kd_det
    has (a project's own) start from the student's values.

    Raises:
        FileNotFoundError: an unknown file or zoo name; lists the nearest.
        ValueError: no config, or no weights.
    """
    name = cfg.KD.TEACHER.CONFIG_FILE
    if not name:
        raise ValueError(
            "KD.TEACHER.CONFIG_FILE is empty: distillation needs the teacher's config, a yaml file or a model-zoo "
            "name such as 'COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml' (--teacher on the command line)."
        )
    if name == OWN_AVERAGE:
        return _own_average_cfg(cfg)
    teacher_cfg = get_cfg()
    add_kd_config(teacher_cfg)
    add_missing_keys(teacher_cfg, cfg)
    weights = cfg.KD.TEACHER.WEIGHTS
    if name.partition("://")[0] in NETWORK_SOURCES:
        configure = getattr(student_class(cfg), "configure_teacher", configure_feature_teacher)
        configure(teacher_cfg, name)
    elif "://" in name:
        raise ValueError(
            f"KD.TEACHER.CONFIG_FILE {name!r} is a URL. Expected a yaml file, a model-zoo name, or a network as "
            f"{' or '.join(f'{source}://NAME' for source in NETWORK_SOURCES)}."
        )
    elif PathManager.isfile(name):
        merge_config_file(teacher_cfg, name)
    else:
        merge_config_file(teacher_cfg, _zoo_config_file(name))
        weights = weights or model_zoo.get_checkpoint_url(name)
    merge_options(teacher_cfg, cfg.KD.TEACHER.OPTS, where="KD.TEACHER.OPTS")
    if teacher_cfg.MODEL.META_ARCHITECTURE == "Distiller":
        teacher_cfg.MODEL.META_ARCHITECTURE = teacher_cfg.KD.STUDENT.META_ARCHITECTURE
    teacher_cfg.MODEL.WEIGHTS = weights or teacher_cfg.MODEL.WEIGHTS
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    if not teacher_cfg.MODEL.WEIGHTS:
        raise ValueError(
            f"The teacher {name!r} has no weights, and would teach noise: set KD.TEACHER.WEIGHTS (--teacher-weights)."
        )
    teacher_cfg.freeze()
    return teacher_cfg


def build_teacher(cfg: CfgNode) -> nn.Module:
    """
    Build the teacher of a student's config and load its weights: its own meta-architecture, in eval mode, without
    gradients, on ``MODEL.DEVICE``. Its ``input_format`` is its channel order.

    Raises:
        ValueError: an unknown config or meta-architecture, or weights that are missing, misshapen or left over.
        FileNotFoundError: the weights' file does not exist.
    """
    teacher_cfg = get_teacher_cfg(cfg)
    model = build_teacher_architecture(teacher_cfg)
    if getattr(model, "input_format", None) is None:
        model.input_format = teacher_cfg.INPUT.FORMAT
    if cfg.KD.TEACHER.CONFIG_FILE == OWN_AVERAGE:
        return ema_teacher(model.to(teacher_cfg.MODEL.DEVICE), cfg.KD.TEACHER.EMA_DECAY)
    load_strictly(model, teacher_cfg.MODEL.WEIGHTS, who=f"teacher {cfg.KD.TEACHER.CONFIG_FILE!r}")
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(f"Teacher {cfg.KD.TEACHER.CONFIG_FILE}: {parameters:,} parameters from {teacher_cfg.MODEL.WEIGHTS}")
    return model.to(teacher_cfg.MODEL.DEVICE).eval().requires_grad_(False)


def teacher_dtype(cfg: CfgNode) -> torch.dtype:
    """``KD.TEACHER.DTYPE``; a ``ValueError`` for another name than float32, bfloat16 or float16."""
    name, known = cfg.KD.TEACHER.DTYPE, ("float32", "bfloat16", "float16")
    if name not in known:
        raise ValueError(unknown_name("KD.TEACHER.DTYPE", name, known))
    return getattr(torch, name)


def build_teacher_architecture(teacher_cfg: CfgNode) -> nn.Module:
    """The network of :func:`get_teacher_cfg`, without weights; a ``ValueError`` for an unknown meta-architecture."""
    name, registered = teacher_cfg.MODEL.META_ARCHITECTURE, dict(META_ARCH_REGISTRY)
    if name not in registered:
        raise ValueError(unknown_name("teacher meta-architecture", name, registered))
    return registered[name](teacher_cfg)


def load_teacher(*, model: nn.Module, weights: str, input_format: Optional[str] = None) -> nn.Module:
    """
    A detector with its trained weights (a file or URL), as ``Distiller(teacher=...)`` wants it; ``input_format`` is the
    channel order that it was trained with, by default its own.

    Raises:
        FileNotFoundError, ValueError: weights that do not exist or do not fit.
    """
    load_strictly(model, weights, who=f"teacher {type(model).__name__}")
    if input_format is not None:
        model.input_format = input_format
    return model.eval().requires_grad_(False)


def _own_average_cfg(cfg: CfgNode) -> CfgNode:
    """The student's config; its weights are those of the student's first step."""
    if unused := [key for key in ("WEIGHTS", "OPTS") if cfg.KD.TEACHER[key]]:
        raise ValueError(f"KD.TEACHER.{unused[0]} is not for CONFIG_FILE {OWN_AVERAGE!r}, the student's own average.")
    if cfg.KD.INHERIT:
        raise ValueError(f"KD.INHERIT needs a trained teacher, and KD.TEACHER.CONFIG_FILE is {OWN_AVERAGE!r}.")
    teacher_cfg = cfg.clone()
    teacher_cfg.defrost()
    if teacher_cfg.MODEL.META_ARCHITECTURE == "Distiller":
        teacher_cfg.MODEL.META_ARCHITECTURE = teacher_cfg.KD.STUDENT.META_ARCHITECTURE
    teacher_cfg.MODEL.WEIGHTS = teacher_cfg.MODEL.TIMM.WEIGHTS = ""
    teacher_cfg.freeze()
    return teacher_cfg


def _zoo_config_file(name: str) -> str:
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        root = Path(model_zoo.__file__).parent / "configs"
        known = sorted(str(path.relative_to(root)) for path in root.glob("*/**/*.yaml") if "Base" not in path.name)
        raise FileNotFoundError(
            f"KD.TEACHER.CONFIG_FILE {name!r} is neither a file nor in Detectron2's model zoo. "
            + unknown_name("model-zoo name", name, known)
        ) from None
