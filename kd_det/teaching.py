"""Which losses learn from which teacher: as a config wants it, and as a checkpoint keeps it."""

import logging
from collections.abc import Sequence
from typing import Any, Dict, Optional

from detectron2.config import CfgNode
from torch import Tensor, nn

from kd_det.errors import first_few
from kd_det.features.unlabelled import PseudoLabels
from kd_det.losses.build import DistillationLoss, build_losses, enabled_loss_classes
from kd_det.losses.class_loss import known_classes
from kd_det.random_state import preserved_random_state
from kd_det.teachers.build import build_teacher, teacher_dtype
from kd_det.teachers.ensemble import AveragedTeacher, OtherTeacher, TeacherAverage, planned_teachers
from kd_det.teachers.runner import Teacher
from kd_det.weights.inherit import inherit_weights

__all__ = ["build_teachers_and_losses", "check_teaching", "distillation_state", "load_distillation_state"]

logger = logging.getLogger(__name__)

# Where a checkpoint keeps what the losses own, and which teacher that belongs to: beside the weights, in the metadata
# that torch attaches to a state dict and that plain models ignore.
_STATE_KEY = "kd_det.losses"
_TEACHER_KEY = "kd_det.teacher"
# By the names of further teachers, of teachers whose weights change, and of losses whose weights set themselves.
_OTHER_TEACHERS_KEY = "kd_det.other_teachers"
_AVERAGES_KEY = "kd_det.teacher_averages"
_AUTO_WEIGHTS_KEY = "kd_det.auto_weights"


def build_teachers_and_losses(cfg: CfgNode, student: nn.Module, teacher: Optional[nn.Module] = None) -> Dict[str, Any]:
    """
    The arguments of a Distiller that a config describes: ``teacher``, ``losses``, ``teacher_dtype``,
    ``other_teachers``; none of them where nothing is distilled; ``pseudo_labels`` with unlabelled images.
    ``KD.INHERIT`` is done.

    Args:
        teacher: that of ``KD.TEACHER``, where it is built already.

    Raises:
        ValueError, FileNotFoundError: see :func:`kd_det.build_teacher` and :func:`kd_det.losses.build_losses`.
    """
    unlabelled = cfg.KD.UNLABELLED
    labels = unlabelled.RATIO > 0 and not unlabelled.RESULTS and unlabelled.WEIGHT > 0
    plans = planned_teachers(cfg)
    labels = labels and any(plan.cfg.KD.TEACHER.CONFIG_FILE for plan in plans if not plan.name)
    distils = bool(enabled_loss_classes(cfg) or cfg.KD.INHERIT or labels)
    averaged = [plan for plan in plans if not plan.name and distils]
    others = [plan for plan in plans if plan.name and enabled_loss_classes(plan.cfg)]
    ret: Dict[str, Any] = {}
    # What distillation draws at random must not shift what training draws after it.
    with preserved_random_state():
        networks = [build_teacher(p.cfg) if i or teacher is None else teacher for i, p in enumerate(averaged)]
        if networks:
            dtypes = [teacher_dtype(plan.cfg) for plan in averaged]
            inherit_weights(student, networks[0], cfg.KD.INHERIT)
            several = len(networks) > 1
            ret["teacher"] = TeacherAverage(networks, [p.weight for p in averaged], dtypes) if several else networks[0]
            ret.update(losses=build_losses(cfg, student, networks[0]), teacher_dtype=dtypes[0])
        for plan in others:
            network = build_teacher(plan.cfg)
            losses = build_losses(plan.cfg, student, network)
            other = OtherTeacher(plan.name, network, losses, teacher_dtype(plan.cfg))
            ret["other_teachers"] = [*ret.get("other_teachers", ()), other]
    if unlabelled.RATIO > 0:
        labelling = [(averaged[0], networks[0])] if networks else []
        labelling += [(plan, other.teacher) for plan, other in zip(others, ret.get("other_teachers", ()))]
        options = {"threshold": unlabelled.THRESHOLD, "weight": unlabelled.WEIGHT}
        if unlabelled.RESULTS:
            options["from_teacher"] = False
        elif labelling:
            plan, network = labelling[0]
            options.update(known_classes(plan.cfg, network))
        ret["pseudo_labels"] = PseudoLabels(**options)
    return ret


def check_teaching(loss: DistillationLoss, teachers: Sequence[nn.Module]) -> None:
    """A ``ValueError`` for a loss that its teacher, or the average of its teachers, cannot teach."""
    if len(teachers) > 1 and loss.needs_one_teacher:
        raise ValueError(
            f"{type(loss).__name__} reads the teacher's network itself, and several are averaged: give it a teacher of "
            f"its own (NAME and LOSSES in an entry of KD.TEACHERS)."
        )
    known = {tuple(names) for teacher in teachers if (names := getattr(teacher, "class_names", ()))}
    if loss.compares_classes and len(known) > 1:
        raise ValueError(
            f"{type(loss).__name__} compares class by class, and the averaged teachers know different classes, or the "
            f"same in another order: {' and '.join(first_few(list(names)) for names in sorted(known))}."
        )
    if loss.auto is not None and hasattr(teachers[0], "ema_decay"):
        raise ValueError(
            f"{loss.key}: the student's average begins as the student, where the gradient is 0 and sets no weight: set "
            f"{loss.config_key('AUTO_WEIGHT')} to 0.0, and a WEIGHT."
        )


def distillation_state(losses: nn.ModuleDict, teachers: Dict[str, "Teacher | AveragedTeacher"]) -> Dict[str, Any]:
    """What a checkpoint keeps beside the student's weights, by keys of a state dict's metadata."""
    state = dict(losses.state_dict())
    automatic = {name: (a.measured, a.task, a.loss) for name, loss in losses.items() if (a := loss.auto) is not None}
    ret = {
        _STATE_KEY: state,
        _AUTO_WEIGHTS_KEY: automatic,
        _AVERAGES_KEY: {name: kept for name, teacher in teachers.items() if (kept := teacher.state_dict())},
    }
    if state or automatic:
        ret[_TEACHER_KEY] = teachers[""].fingerprint if "" in teachers else ""
        ret[_OTHER_TEACHERS_KEY] = {name: teacher.fingerprint for name, teacher in teachers.items() if name}
    return {key: value for key, value in ret.items() if value}


def load_distillation_state(
    metadata: Dict[str, Any], losses: nn.ModuleDict, teachers: Dict[str, "Teacher | AveragedTeacher"]
) -> None:
    """Restore what :func:`distillation_state` gave; what belongs to another teacher than its loss' now starts anew."""
    state, automatic = dict(metadata.get(_STATE_KEY, {})), dict(metadata.get(_AUTO_WEIGHTS_KEY, {}))
    # Checkpoints of kd_det 0.1.0 do not name their teacher.
    made_with = {"": metadata.get(_TEACHER_KEY), **metadata.get(_OTHER_TEACHERS_KEY, {})}
    for name, teacher in teachers.items():
        teacher.load_state_dict(metadata.get(_AVERAGES_KEY, {}).get(name, {}))
        if made_with.get(name) in (None, teacher.fingerprint):
            continue
        theirs = {label for label, loss in losses.items() if loss.teacher_name == name}
        kept = {key: value for key, value in state.items() if key.partition(".")[0] not in theirs}
        if len(kept) < len(state) or theirs & automatic.keys():
            logger.warning("The weights were distilled from another teacher: connectors and margins start anew.")
        state, automatic = kept, {label: value for label, value in automatic.items() if label not in theirs}
    _load_losses(losses, state)
    for label, measured in automatic.items():
        if label in losses and losses[label].auto is not None:
            losses[label].auto.measured, losses[label].auto.task, losses[label].auto.loss = measured
            losses[label].weight = losses[label].auto.weight or losses[label].weight


def _load_losses(losses: nn.ModuleDict, state: Dict[str, Tensor]) -> None:
    """Restore each loss whose whole state is there in its shapes."""
    for name, loss in losses.items():
        own = {key: tuple(value.shape) for key, value in loss.state_dict().items()}
        saved = {key.removeprefix(f"{name}."): v for key, v in state.items() if key.startswith(f"{name}.")}
        saved = loss.upgrade_state(saved) if saved else saved
        if own and {key: tuple(value.shape) for key, value in saved.items()} == own:
            loss.load_state_dict(saved)
        elif own:
            logger.info(f"The weights hold no state for {loss.key}: its connectors and margins start anew.")
