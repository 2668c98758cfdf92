"""Checks of the numbers in ``CLASSIFICATION.*``, of the data sets, and of what a backbone without a head learns."""

import functools
import math
from collections.abc import Sequence
from numbers import Real

import torch
from detectron2.config import CfgNode
from torch import nn

from kd_det.classification.data import check_classes, load_dataset, load_images
from kd_det.classification.mapper import build_mapper
from kd_det.errors import DatasetError, UserError, first_few
from kd_det.features.taps import Taps, tap_names
from kd_det.losses.build import enabled_loss_classes
from kd_det.student import student_class
from kd_det.teachers.ensemble import planned_teachers

__all__ = ["check_data", "check_input", "check_needs_no_labels", "check_whole_backbone_learns"]

# The least and the most that each key may be.
_RANGES = {
    **dict.fromkeys(("TEST_BATCH_SIZE", "PREFETCH_FACTOR", "PROBE.MAX_IMAGES", "PROBE.NEIGHBOURS"), (1, math.inf)),
    **dict.fromkeys(("AUG.TRAIN_SIZE", "AUG.TEST_RESIZE", "AUG.TEST_SIZE"), (1, math.inf)),
    **dict.fromkeys(("INPUT_SIZE", "AUG.RAND_AUGMENT_OPS", "AUG.MIXUP", "AUG.CUTMIX"), (0, math.inf)),
    "EMA_DECAY": (0, math.nextafter(1, 0)),  # 1 would average nothing
    "AUG.FLIP": (0, 1),
    "AUG.RAND_AUGMENT_MAGNITUDE": (0, 30),
}

# So many images without labels are read before a run.
_SAMPLE = 64


def check_input(cfg: CfgNode) -> None:
    """Raise a ``ValueError`` for a number out of its range or an unknown word in what turns files into batches."""
    node = cfg.CLASSIFICATION
    for key, (least, most) in _RANGES.items():
        value = functools.reduce(CfgNode.__getitem__, key.split("."), node)
        if not least <= value <= most:
            expected = f"at least {least}" if most == math.inf else f"in {least} to {most}"
            raise ValueError(f"CLASSIFICATION.{key} must be {expected}, found {value}.")
    for key in ("SCALE", "RATIO"):
        value = node.AUG[key]
        if not _numbers(value, 2) or not 0 < value[0] <= value[1]:
            raise ValueError(f"CLASSIFICATION.AUG.{key} must be two positive numbers in order, found {value}.")
    jitter = node.AUG.COLOR_JITTER
    if not _numbers(jitter, 4) or min(jitter) < 0 or jitter[3] > 0.5:
        raise ValueError(
            f"CLASSIFICATION.AUG.COLOR_JITTER must be four numbers (brightness, contrast, saturation and hue), none "
            f"negative, the hue at most 0.5, found {jitter}."
        )
    build_mapper(cfg, is_train=True)


def check_data(cfg: CfgNode, training_sets: Sequence[str], test_sets: Sequence[str]) -> None:
    """
    Raise a ``DatasetError`` or ``UserError`` for data sets that cannot be used. Of images without labels, an even
    sample is read: nobody may have looked at them yet, and one that is corrupt should not stop a run late.
    """
    if student_class(cfg).needs_labels:
        return check_classes(cfg, [*training_sets, *test_sets])
    if training_sets:
        dicts, mapper = load_images(training_sets), build_mapper(cfg, is_train=False)
        sample = dicts[:: -(-len(dicts) // _SAMPLE)]
        if sum(mapper(x) is None for x in sample) == len(sample):
            raise DatasetError(f"no image of {', '.join(training_sets)} that was tried can be read")
    if test_sets:
        probe = cfg.CLASSIFICATION.PROBE.TRAIN
        if not probe or probe in test_sets:
            raise UserError(
                f"DATASETS.TEST {tuple(test_sets)} is classified by k-NN and a linear probe, which learn from another "
                f"data set with labels: set CLASSIFICATION.PROBE.TRAIN to its name, found {probe!r}"
            )
        load_dataset([probe, *test_sets])


def check_needs_no_labels(cfg: CfgNode) -> None:
    """Raise a ``UserError`` where a backbone without a head is to be taught nothing, or by what needs class scores."""
    student = student_class(cfg)
    if getattr(student, "needs_labels", True):
        return
    plans = planned_teachers(cfg) if cfg.MODEL.META_ARCHITECTURE == "Distiller" else []
    losses = dict.fromkeys(loss for plan in plans for loss in enabled_loss_classes(plan.cfg))
    if not losses:
        raise UserError(
            f"{student.__name__} learns from a teacher's maps alone, and no loss is on: name a teacher by --teacher "
            f"(or MODEL.META_ARCHITECTURE Distiller, KD.TEACHER.CONFIG_FILE and KD.LOSSES)"
        )
    scoring = [loss.__name__ for loss in losses if loss.compares_classes or loss.needs_labels]
    if scoring:
        raise UserError(
            f"{', '.join(scoring)} compare class scores or need labels, and {student.__name__} has neither: take "
            f"losses on maps, such as FeatureDistillation, NST, Similarity (KD.SIMILARITY.SAMPLES 'images') or Hint"
        )


def check_whole_backbone_learns(cfg: CfgNode, model: nn.Module) -> None:
    """
    Raise a ``UserError`` if a part of the backbone of a Distiller's student without losses of its own lies behind every
    tap, and would be exported as it was drawn at random, or if no loss acts until the end.
    """
    student = getattr(model, "student", model)
    if student.needs_labels:
        return
    losses = list(model.losses.values())
    if any(loss.auto is not None for loss in losses):
        raise UserError(
            f"KD.AUTO_WEIGHT measures losses against the student's own, and {type(student).__name__} has none: set it 0"
        )
    if not any(loss.factor(cfg.SOLVER.MAX_ITER - 1) for loss in losses):
        raise UserError(
            f"{type(student).__name__} learns from distillation losses alone, and all of them stop (KD.STOP_ITER) "
            f"before SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER}"
        )
    names = [tap for loss in losses for tap in loss.student_taps]
    if not names:  # a project's own losses, which read something else
        return
    parameters = {name: p for name, p in student.backbone.named_parameters() if p.requires_grad}
    side, taps = cfg.CLASSIFICATION.AUG.TRAIN_SIZE, Taps(student, names, side="student")
    student.eval()  # batch norm takes no statistics of one image
    with taps.recording():
        student.backbone(student.preprocess_image([{"image": torch.zeros(3, side, side)}]).tensor)
    total = sum(value.sum() for values in taps.pop().values() for value in values)
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    for handle in taps.handles:
        handle.remove()
    unused = [name for name, gradient in zip(parameters, found) if gradient is None]
    if unused:
        raise UserError(
            f"no loss reads behind the student's {first_few(names)}, so {len(unused)} of the backbone's weights would "
            f"stay as they are ({unused[0]}, ...): read a deeper level ({first_few(tap_names(student))}), or end the "
            f"backbone there by MODEL.RESNETS.OUT_FEATURES or MODEL.TIMM.OUT_FEATURES"
        )


def _numbers(value, count: int) -> bool:
    return len(value) == count and all(isinstance(x, Real) and math.isfinite(x) for x in value)
