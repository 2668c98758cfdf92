"""From the config of any detector to that of a distillation run: ``--teacher`` and ``--losses``."""

import logging
import re

from detectron2.config import CfgNode
from torch import nn

from kd_det.config_file import merge_options
from kd_det.errors import UserError
from kd_det.features.classes import match_classes
from kd_det.losses import loss_class
from kd_det.losses.class_loss import known_classes
from kd_det.random_state import preserved_random_state
from kd_det.student import build_student
from kd_det.teachers.build import build_teacher_architecture, get_teacher_cfg

__all__ = ["add_teacher", "choose_losses", "name_teacher"]

logger = logging.getLogger(__name__)

# Stands in KD.LOSSES until choose_losses has seen both networks; no loss has this name.
UNDECIDED = ("chosen with the networks",)


def name_teacher(cfg: CfgNode, teacher: str, *, weights: str = "", losses=None) -> None:
    """Turn any detector's config into one of distillation, in place. Nothing is built; losses None: undecided."""
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        cfg.KD.STUDENT.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.KD.TEACHER.CONFIG_FILE = teacher
    cfg.KD.TEACHER.WEIGHTS = weights
    cfg.KD.LOSSES = UNDECIDED if losses is None else tuple(losses)


def choose_losses(cfg: CfgNode, student: nn.Module, teacher: nn.Module, *, opts=()) -> list:
    """
    What completes the config of :func:`name_teacher` where its networks are known, as KEY, VALUE, KEY, VALUE, ...: the
    default losses, ``NST`` and, if both have ROI heads that share classes, ``SoftTarget``, or ``FeatureDistillation``
    for a backbone without a head; and taps on pyramid levels restricted to those that both backbones have, unless the
    user's ``opts`` hold the key.

    Raises:
        ValueError: an unknown loss, or no level in common.
    """
    ret, losses = [], tuple(cfg.KD.LOSSES)
    if losses == UNDECIDED:
        classes = [getattr(getattr(network, "roi_heads", None), "num_classes", None) for network in (student, teacher)]
        losses = ("NST",) if getattr(student, "needs_labels", True) else ("FeatureDistillation",)
        if None not in classes:
            try:
                match_classes(*classes, **known_classes(cfg, teacher))
                losses = ("NST", "SoftTarget")
            except ValueError as e:
                if cfg.KD.TEACHER.CLASS_MAP or cfg.KD.TEACHER.CLASSES:
                    raise
                logger.warning(f"--teacher: distilled by NST alone. Soft targets compare class by class: {e}")
        ret += ["KD.LOSSES", str(losses)]
    shapes = [network.backbone.output_shape() for network in (student, teacher)]
    shared = [level for level in shapes[0] if level in shapes[1]]
    for name in (loss_class(loss).name.upper() for loss in losses):
        taps, key = cfg.KD.get(name, {}).get("STUDENT_TAPS"), f"KD.{name}.STUDENT_TAPS"
        are_levels = taps and all(isinstance(tap, str) and re.fullmatch(r"p\d+", tap) for tap in taps)
        if not are_levels or set(taps) <= set(shared) or key in opts[::2]:
            continue
        if not shared:
            raise UserError(
                f"The backbones have no level in common: the student's are {', '.join(shapes[0])}, the teacher's "
                f"{', '.join(shapes[1])}. Pair them by STUDENT_TAPS and TEACHER_TAPS of KD.{name}."
            )
        ret += [key, str(tuple(level for level in taps if level in shared) or tuple(shared))]
    return ret


def add_teacher(cfg: CfgNode, teacher: str, *, weights: str = "", losses=None) -> None:
    """
    Turn the config of any detector into one that distils a teacher into it, in place. Both networks are built, without
    weights, to choose losses and levels.

    Args:
        cfg: a config with the KD node; a plain one's meta-architecture becomes the student's.
        teacher: config file or model-zoo name.
        weights: the teacher's weights; empty: the zoo entry's checkpoint, or the config's.
        losses: names of losses; None: the default.

    Raises:
        ValueError: an unknown teacher, meta-architecture or loss, or no level in common.
    """
    name_teacher(cfg, teacher, weights=weights, losses=losses)
    on_cpu = cfg.clone()
    on_cpu.MODEL.DEVICE = "cpu"
    on_cpu.MODEL.TIMM.WEIGHTS = ""  # only the levels matter
    with preserved_random_state():
        networks = build_student(on_cpu), build_teacher_architecture(get_teacher_cfg(on_cpu))
    merge_options(cfg, choose_losses(cfg, *networks), where="--teacher")
