"""From the config of any detector to that of a distillation run: ``--teacher`` and ``--losses``."""

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
from kd_det.teachers.build import OWN_AVERAGE, build_teacher_architecture, get_teacher_cfg
from kd_det.weights.inherit import shared_parts

__all__ = ["add_teacher", "choose_losses", "name_teacher"]

# What a student inherits by default above its backbone: of the parts that tell classes apart, where they are the same.
PARTS = ("fpn", "proposal_generator")
CLASS_PARTS = ("roi_heads", "head")
PARTS_BELOW_CLASSES = ("roi_heads.box_head", "head.bbox_subnet")
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
    default recipe, ``PKD`` for a student that starts from the teacher's weights above the backbone, where they fit
    (``FeatureDistillation`` alone for a backbone without a head); and taps on pyramid levels restricted to those that
    both backbones have. Unless the user's ``opts``, or the config, hold the key.

    Raises:
        ValueError: an unknown loss, no level in common, or classes of the teacher that do not fit it.
    """
    ret, losses = [], tuple(cfg.KD.LOSSES)
    if losses == UNDECIDED:
        has_head, is_trained = getattr(student, "needs_labels", True), cfg.KD.TEACHER.CONFIG_FILE != OWN_AVERAGE
        losses = ("PKD",) if has_head else ("FeatureDistillation",)
        ret += ["KD.LOSSES", str(losses)]
        if has_head and is_trained and not cfg.KD.INHERIT and "KD.INHERIT" not in opts[::2]:
            of_classes = CLASS_PARTS if _same_classes(cfg, student, teacher) else PARTS_BELOW_CLASSES
            ret += ["KD.INHERIT", str(shared_parts(student, teacher, (*PARTS, *of_classes)))]
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


def _same_classes(cfg: CfgNode, student: nn.Module, teacher: nn.Module) -> bool:
    counts = [getattr(getattr(network, "roi_heads", network), "num_classes", None) for network in (student, teacher)]
    if None in counts:
        return False
    try:
        return match_classes(*counts, **known_classes(cfg, teacher)) is None
    except ValueError:
        if cfg.KD.TEACHER.CLASS_MAP or cfg.KD.TEACHER.CLASSES:  # what the user says of them
            raise
        return False


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
