"""Whether the class lists of a run's data sets, its config and its teacher agree."""

from kd_det.cli.checks.run import PlannedRun
from kd_det.errors import UserError
from kd_det.losses.class_loss import ClassLoss
from kd_det.student import DISTILLER, student_class
from kd_det.teachers.build import NUM_CLASSES, get_teacher_cfg
from kd_det.teachers.ensemble import planned_teachers


def check_class_lists(run: PlannedRun) -> None:
    """Data sets of one run with different classes, or another number of classes than the config's."""
    known = _known_classes(run)
    first, classes = next(iter(known.items()), (None, []))
    for name, others in known.items():
        if others != classes:
            difference = _difference(classes, others)
            raise UserError(f"the data sets '{first}' and '{name}' have different classes: {difference}")
    node = NUM_CLASSES.get(student_class(run.cfg).__name__)
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
    """
    A project's loss that compares class by class, with a teacher that is known to have been trained on other classes.
    Losses of kd_det match them by name.
    """
    # The losses of a plain RetinaNet are a method; a teacher that is evaluated by itself has no model to train.
    if run.model is None or run.cfg.MODEL.META_ARCHITECTURE != DISTILLER:
        return
    losses = run.model.losses.values()
    comparing = [loss for loss in losses if loss.compares_classes and not isinstance(loss, ClassLoss)]
    known = _known_classes(run)
    if not comparing or not known:
        return
    name, classes = next(iter(known.items()))
    for plan in planned_teachers(run.cfg):
        losses = [type(loss).__name__ for loss in comparing if loss.teacher_name == plan.name]
        theirs = list(get_teacher_cfg(plan.cfg).KD.TEACHER.CLASSES) if losses else []
        if theirs and theirs != classes:
            raise UserError(
                f"{', '.join(losses)} compare class by class, and the teacher's classes (KD.TEACHER.CLASSES, or "
                f"DATASETS.TRAIN of its config) are not the student's, of '{name}': {_difference(theirs, classes)}"
            )


def _known_classes(run: PlannedRun) -> dict[str, list[str]]:
    return {name: list(summary.thing_classes) for name, summary in run.datasets.items() if summary.thing_classes}


def _difference(one: list[str], other: list[str]) -> str:
    for i, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return f"class {i} is '{a}' and '{b}'"
    return f"{len(one)} and {len(other)} classes"
