"""Which of the student's classes are which of the teacher's. Shapes: S classes that both know."""

import dataclasses
import logging
import re
from collections.abc import Sequence

import torch
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from kd_det.errors import first_few, unknown_name
from kd_det.features.regions import RegionTargets

__all__ = ["ClassMatch", "match_classes"]


class ClassMatch(nn.Module):
    """
    The classes that both networks know. Its tables are buffers, so that they are on the device of the loss, and are in
    no checkpoint.
    """

    def __init__(self, pairs: dict[int, int], student: int, teacher: int):
        """
        Args:
            pairs: the teacher's class of each of the student's that is shared.
            student, teacher: how many classes each has, without the background, which is the class behind them.
        """
        super().__init__()
        pairs = {**dict(sorted(pairs.items())), student: teacher}
        places = {mine: place for place, mine in enumerate(pairs)}
        tables = {
            "student": list(pairs),
            "teacher": list(pairs.values()),
            "to_place": [places.get(i, -1) for i in range(student + 1)],
            "to_teacher": [pairs.get(i, -1) for i in range(student + 1)],
            "to_student": [{theirs: mine for mine, theirs in pairs.items()}.get(i, -1) for i in range(teacher + 1)],
        }
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def logits(self, student: Tensor, teacher: Tensor, *, background: bool, num_anchors: int = 1) -> list[Tensor]:
        """
        Both networks' logits (N, A K, ...) of the shared classes alone, in the student's order: (N, A S, ...), or
        (N, S + 1, ...) with ``background``, the last channel of both. Their softmax is renormalised over these.
        """
        last = None if background else -1
        return [
            x.unflatten(1, (num_anchors, -1)).index_select(2, index[:last]).flatten(1, 2)
            for x, index in ((student, self.student), (teacher, self.teacher))
        ]

    def places(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Of the student's classes (R,): their channels among :meth:`logits`, 0 where not shared; and which are."""
        places = self.to_place[classes]
        return places.clamp(min=0), places >= 0

    def of_teacher(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Of the student's classes (R,): the teacher's, 0 where not shared; and which are."""
        theirs = self.to_teacher[classes]
        return theirs.clamp(min=0), theirs >= 0

    def of_student(self, classes: Tensor) -> Tensor:
        """Of the teacher's classes (R,): the student's, -1 where not shared."""
        return self.to_student[classes]

    def targets_of_teacher(self, targets: RegionTargets) -> RegionTargets:
        """The same regions with the teacher's classes; those of a class that it does not know are not foreground."""
        classes, shared = self.of_teacher(targets.classes)
        return dataclasses.replace(targets, classes=classes, foreground=targets.foreground & shared)


def match_classes(
    student: int,
    teacher: int,
    *,
    student_classes: Sequence[str] = (),
    teacher_classes: Sequence[str] = (),
    class_map: Sequence[tuple[str | int, str | int]] = (),
) -> ClassMatch | None:
    """
    Match the classes of two networks: those of an explicit map, and those of the same name, where capitals, spaces,
    hyphens and underscores do not count.

    Args:
        student, teacher: how many classes each has, without the background.
        student_classes: names, in order; fewer than its classes if the last ones are unused; empty: unknown.
        teacher_classes: names, in order; empty: unknown.
        class_map: the student's class and the teacher's, each by name or number.

    Returns:
        None where both have the same classes in the same order, or as many of which nothing is known.

    Raises:
        ValueError: no class in common, numbers that differ without names, names that are not one for each class or
            stand twice, or a map with an unknown or repeated class.
    """
    if len(student_classes) > student or teacher_classes and len(teacher_classes) != teacher:
        raise ValueError(
            f"expected a name for each class, found {len(student_classes)} names for the student's {student} classes "
            f"and {len(teacher_classes)} for the teacher's {teacher} (KD.TEACHER.CLASSES)."
        )
    by_name = bool(student_classes and teacher_classes)
    are_alike = not by_name or list(student_classes) == list(teacher_classes)
    if student == teacher and are_alike and not class_map:
        return None
    if not by_name and not class_map:
        raise ValueError(
            f"the student has {student} classes and the teacher {teacher}, and the names of the "
            f"{'student' if teacher_classes else 'teacher'}'s are not known. Make their numbers equal "
            f"(MODEL.ROI_HEADS.NUM_CLASSES in an R-CNN), name the teacher's in KD.TEACHER.CLASSES (the student's are "
            f"those of DATASETS.TRAIN), or pair them by number in KD.TEACHER.CLASS_MAP."
        )
    pairs = _read_map(class_map, (student, student_classes), (teacher, teacher_classes))
    if by_name:
        mine = _by_name("student", student_classes, but=pairs)
        theirs = _by_name("teacher", teacher_classes, but=pairs.values())
        pairs |= {mine[name]: theirs[name] for name in mine if name in theirs}
    if not pairs:
        raise ValueError(
            f"student and teacher have no class in common: the student's are {first_few(list(student_classes))}, the "
            f"teacher's {first_few(list(teacher_classes))}. Pair them in KD.TEACHER.CLASS_MAP or, if the teacher's "
            f"names are others, correct them in KD.TEACHER.CLASSES."
        )
    if student == teacher and pairs == {i: i for i in range(student)}:
        return None
    names = [student_classes[i] if i < len(student_classes) else str(i) for i in range(student)]
    shared, missing = (", ".join(n for i, n in enumerate(names) if (i in pairs) == known) for known in (True, False))
    message = f"The teacher knows {len(pairs)} of the student's {student} classes: {shared}"
    message += f"; it teaches nothing about {missing}." if missing else "."
    log_first_n(logging.WARNING if missing else logging.INFO, message, name=__name__, key="message")
    return ClassMatch(pairs, student, teacher)


def _read_map(class_map: Sequence, *sides: tuple[int, Sequence[str]]) -> dict[int, int]:
    pairs: dict[int, int] = {}
    for pair in class_map:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"KD.TEACHER.CLASS_MAP holds pairs of a student's and a teacher's class, found {pair!r}.")
        mine, theirs = (_find(side, which, *known) for side, which, known in zip(("student", "teacher"), pair, sides))
        if mine in pairs or theirs in pairs.values():
            raise ValueError(f"KD.TEACHER.CLASS_MAP has {pair[0] if mine in pairs else pair[1]!r} twice.")
        pairs[mine] = theirs
    return pairs


def _find(side: str, which: str | int, count: int, names: Sequence[str]) -> int:
    if isinstance(which, int) and 0 <= which < count:
        return which
    keys = [_key(name) for name in names]
    if isinstance(which, str) and _key(which) in keys:
        return keys.index(_key(which))
    if names:
        raise ValueError("KD.TEACHER.CLASS_MAP: " + unknown_name(f"class of the {side}", which, names, most=20))
    raise ValueError(
        f"KD.TEACHER.CLASS_MAP has {which!r}, and the names of the {side}'s classes are not known: expected a number "
        f"below {count}."
    )


def _by_name(side: str, names: Sequence[str], *, but) -> dict[str, int]:
    """Each class by its name, but for those that the map has paired."""
    ret: dict[str, int] = {}
    for i, name in enumerate(names):
        if i not in but and ret.setdefault(_key(name), i) != i:
            raise ValueError(f"{name!r} names two of the {side}'s classes: pair by number in KD.TEACHER.CLASS_MAP.")
    return ret


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
