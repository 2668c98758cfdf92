"""Whether the class lists of a run's data sets, its config and its teacher agree."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from kd_det.cli.checks.run import PlannedRun
from kd_det.errors import UserError
from kd_det.student import student_class
from kd_det.teachers.build import get_teacher_cfg
from kd_det.teachers.ensemble import planned_teachers

# Where the number of classes of a meta-architecture stands in its config.
_NUM_CLASSES = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}


def check_class_lists(run: PlannedRun) -> None:
    """Data sets of one run with different classes, or another number of classes than the config's."""
    known = _known_classes(run)
    first, classes = next(iter(known.items()), (None, []))
    for name, others in known.items():
        if others != classes:
            difference = _difference(classes, others)
            raise UserError(f"the data sets '{first}' and '{name}' have different classes: {difference}")
    node = _NUM_CLASSES.get(student_class(run.cfg).__name__)
    if node is None:
        return
    key, configured = f"MODEL.{node}.NUM_CLASSES", run.cfg.MODEL[node].NUM_CLASSES
    for name, summary in run.datasets.items():
        found = len(summary.thing_classes) or summary.largest_class + 1
        if found > configured:
            raise UserError(f"data set '{name}' has {found} classes and {key} is {configured}")
    if classes and len(classes) < configured and not run.args.allow_unused_classes:
        raise UserError(
            f"data set '{first}' has {len(classes)} classes and {key} is {configured}: set {key} {len(classes)}, or "
            f"pass --allow-unused-classes (Detectron2's COCO evaluation fails if such a class is detected)"
        )


def check_teacher_classes(run: PlannedRun) -> None:
    """A loss that compares class by class, with a teacher that is known to have been trained on other classes."""
    comparing = [loss for loss in getattr(run.model, "losses", {}).values() if loss.compares_classes]
    known = _known_classes(run)
    if not comparing or not known:
        return
    name, classes = next(iter(known.items()))
    for plan in planned_teachers(run.cfg):
        losses = [type(loss).__name__ for loss in comparing if loss.teacher_name == plan.name]
        for taught_on, theirs in _classes_of_teacher(plan.cfg).items() if losses else ():
            if theirs == classes:
                continue
            raise UserError(
                f"{', '.join(losses)} compare class by class: the teacher was trained on '{taught_on}' (DATASETS.TRAIN "
                f"of its config; if it was not, correct it by KD.TEACHER.OPTS), the student learns '{name}': "
                f"{_difference(theirs, classes)}"
            )


def _known_classes(run: PlannedRun) -> dict[str, list[str]]:
    return {name: list(summary.thing_classes) for name, summary in run.datasets.items() if summary.thing_classes}


def _classes_of_teacher(cfg: CfgNode) -> dict[str, list[str]]:
    """
    The class lists that the teacher was trained on, where they are known. The data sets that a config names tell
    nothing of other weights than its own: of a zoo entry with KD.TEACHER.WEIGHTS, or where the numbers differ.
    """
    node, cfg = cfg.KD.TEACHER, get_teacher_cfg(cfg)
    is_own_file = os.path.isfile(node.CONFIG_FILE)
    if node.WEIGHTS and not is_own_file and "DATASETS.TRAIN" not in node.OPTS:
        return {}
    head = _NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE)
    number = cfg.MODEL[head].NUM_CLASSES if head else None
    # An unknown name makes an empty entry; data sets that register their classes only when read have none yet.
    found = {name: list(MetadataCatalog.get(name).get("thing_classes", ())) for name in cfg.DATASETS.TRAIN}
    return {name: classes for name, classes in found.items() if classes and len(classes) == number}


def _difference(one: list[str], other: list[str]) -> str:
    for i, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return f"class {i} is '{a}' and '{b}'"
    return f"{len(one)} and {len(other)} classes"
