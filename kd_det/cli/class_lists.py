"""Whether the class lists of a run's data sets, its config and its teacher agree."""

import logging
from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from kd_det.errors import UserError
from kd_det.losses.build import enabled_loss_classes
from kd_det.student import student_class
from kd_det.teachers.build import get_teacher_cfg

__all__ = ["check_class_lists"]

logger = logging.getLogger(__name__)


def check_class_lists(cfg: CfgNode, found: Mapping[str, Sequence[str]]) -> None:
    """
    Args:
        cfg: of a detector's run.
        found: class names of every data set of the run, empty where its metadata has none.

    Raises:
        UserError: data sets of one run with different classes, more classes than the config has, or a loss that
            compares class by class with a teacher that was trained on other classes.
    """
    known = {name: list(classes) for name, classes in found.items() if classes}
    if not known:
        return
    first, classes = next(iter(known.items()))
    for name, others in known.items():
        if others != classes:
            difference = _difference(classes, others)
            raise UserError(f"the data sets '{first}' and '{name}' have different classes: {difference}")
    architecture = student_class(cfg).__name__
    node = {"GeneralizedRCNN": "ROI_HEADS", "RetinaNet": "RETINANET"}.get(architecture)
    if node:
        configured = cfg.MODEL[node].NUM_CLASSES
        message = f"data set '{first}' has {len(classes)} classes and MODEL.{node}.NUM_CLASSES is {configured}"
        if len(classes) > configured:
            raise UserError(message)
        if len(classes) < configured:
            logger.warning(f"{message}: {configured - len(classes)} classes will never be seen.")
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        _check_teacher(cfg, first, classes)


def _check_teacher(cfg: CfgNode, name: str, classes: list[str]) -> None:
    losses = [cls.__name__ for cls in enabled_loss_classes(cfg) if cls.compares_classes]
    if not losses:
        return
    for taught_on in get_teacher_cfg(cfg).DATASETS.TRAIN:
        # An unknown name makes an empty entry; data sets that register their classes only when read have none yet.
        theirs = list(MetadataCatalog.get(taught_on).get("thing_classes", ()))
        if theirs and theirs != classes:
            raise UserError(
                f"{', '.join(losses)} compare class by class: the teacher was trained on '{taught_on}' (DATASETS.TRAIN "
                f"of its config), the student learns '{name}': {_difference(theirs, classes)}"
            )


def _difference(one: list[str], other: list[str]) -> str:
    for i, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return f"class {i} is '{a}' and '{b}'"
    return f"{len(one)} and {len(other)} classes"
