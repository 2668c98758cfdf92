"""The teacher, built from its own config, checked to the last weight, and frozen."""

import logging
from typing import List, Optional

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import nn

from kd_det.config import add_kd_config
from kd_det.config_file import add_missing_keys
from kd_det.errors import unknown_name
from kd_det.teachers import feature_teacher, files  # noqa: F401  register their sources
from kd_det.teachers.ema import ema_teacher
from kd_det.teachers.sources import teacher_source
from kd_det.weights.strict import load_strictly

__all__ = ["OWN_AVERAGE", "build_teacher", "build_teacher_architecture", "get_teacher_cfg", "load_teacher"]

logger = logging.getLogger(__name__)

# As KD.TEACHER.CONFIG_FILE: the student's own average, see kd_det.teachers.ema.
OWN_AVERAGE = "ema"


def get_teacher_cfg(cfg: CfgNode) -> CfgNode:
    """
    The teacher's own config: what the source of ``KD.TEACHER.CONFIG_FILE`` knows of it (see
    :mod:`kd_det.teachers.sources`), its weights, its options, on the student's device. Keys that neither Detectron2 nor
    kd_det has (a project's own) start from the student's values. ``KD.TEACHER.CLASSES`` are the names of its classes,
    where they are known.

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
    source = teacher_source(name)
    teacher_cfg = get_cfg()
    add_kd_config(teacher_cfg)
    add_missing_keys(teacher_cfg, cfg)
    source.configure(teacher_cfg, cfg)
    source.merge_options(teacher_cfg, cfg.KD.TEACHER.OPTS)
    if teacher_cfg.MODEL.META_ARCHITECTURE == "Distiller":
        teacher_cfg.MODEL.META_ARCHITECTURE = teacher_cfg.KD.STUDENT.META_ARCHITECTURE
    teacher_cfg.KD.TEACHER.CONFIG_FILE = name
    teacher_cfg.MODEL.WEIGHTS = cfg.KD.TEACHER.WEIGHTS or teacher_cfg.MODEL.WEIGHTS
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    if not teacher_cfg.MODEL.WEIGHTS:
        raise ValueError(
            f"The teacher {name!r} has no weights, and would teach noise: set KD.TEACHER.WEIGHTS (--teacher-weights)."
        )
    teacher_cfg.KD.TEACHER.CLASSES = list(cfg.KD.TEACHER.CLASSES) or _classes_trained_on(teacher_cfg, cfg.KD.TEACHER)
    teacher_cfg.freeze()
    return teacher_cfg


# Where the number of classes of a meta-architecture stands in its config.
NUM_CLASSES = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "TorchvisionFCOS": "RETINANET",
    "TorchvisionRetinaNet": "RETINANET",
}


def _classes_trained_on(teacher_cfg: CfgNode, node: CfgNode) -> List[str]:
    """
    The classes of the data set that a teacher's config names, where they are its own: the config tells nothing of other
    weights (of a zoo entry with ``KD.TEACHER.WEIGHTS``), and has inherited the name where the numbers differ.
    """
    if node.WEIGHTS and not PathManager.isfile(node.CONFIG_FILE) and "DATASETS.TRAIN" not in node.OPTS:
        return []
    head = NUM_CLASSES.get(teacher_cfg.MODEL.META_ARCHITECTURE)
    number = teacher_cfg.MODEL[head].NUM_CLASSES if head else None
    # An unknown name makes an empty entry; data sets that register their classes only when read have none yet.
    found = [list(MetadataCatalog.get(name).get("thing_classes", ())) for name in teacher_cfg.DATASETS.TRAIN]
    return next((classes for classes in found if len(classes) == number), [])


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
        if unused := [key for key in ("WEIGHTS", "EVALUATE") if cfg.KD.TEACHER[key]]:
            raise ValueError(f"KD.TEACHER.{unused[0]} is not for CONFIG_FILE {OWN_AVERAGE!r}, the student's average.")
        return ema_teacher(model.to(teacher_cfg.MODEL.DEVICE), cfg.KD.TEACHER.EMA_DECAY)
    read = teacher_source(cfg.KD.TEACHER.CONFIG_FILE).read_weights(teacher_cfg)
    load_strictly(model, teacher_cfg.MODEL.WEIGHTS, who=f"teacher {cfg.KD.TEACHER.CONFIG_FILE!r}", read=read)
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
    """
    The network of :func:`get_teacher_cfg`, without weights; its ``class_names`` are its classes', where they are known.
    A ``ValueError`` for an unknown meta-architecture.
    """
    model = teacher_source(teacher_cfg.KD.TEACHER.CONFIG_FILE).build(teacher_cfg)
    # A source may read the names with its network, as that of transformers does.
    model.class_names = tuple(teacher_cfg.KD.TEACHER.CLASSES) or getattr(model, "class_names", ())
    return model


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
    if cfg.KD.TEACHER.OPTS:
        raise ValueError(f"KD.TEACHER.OPTS is not for CONFIG_FILE {OWN_AVERAGE!r}, the student's own average.")
    if cfg.KD.INHERIT:
        raise ValueError(f"KD.INHERIT needs a trained teacher, and KD.TEACHER.CONFIG_FILE is {OWN_AVERAGE!r}.")
    teacher_cfg = cfg.clone()
    teacher_cfg.defrost()
    if teacher_cfg.MODEL.META_ARCHITECTURE == "Distiller":
        teacher_cfg.MODEL.META_ARCHITECTURE = teacher_cfg.KD.STUDENT.META_ARCHITECTURE
    teacher_cfg.MODEL.WEIGHTS = teacher_cfg.MODEL.TIMM.WEIGHTS = ""
    teacher_cfg.freeze()
    return teacher_cfg
