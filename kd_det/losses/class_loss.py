"""What losses that compare class by class share: which classes both networks know."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from torch import nn

from kd_det.data import class_names
from kd_det.features.classes import ClassMatch, match_classes
from kd_det.losses.build import DistillationLoss

__all__ = ["ClassLoss", "known_classes"]


def known_classes(cfg: CfgNode, teacher: nn.Module) -> dict:
    """What :func:`match_classes` wants to know: the names of both networks' classes, and ``KD.TEACHER.CLASS_MAP``."""
    theirs, class_map = getattr(teacher, "class_names", ()), cfg.KD.TEACHER.CLASS_MAP
    # Without either, names tell nothing, and the data set need not be read for them.
    mine = class_names(cfg.DATASETS.TRAIN) if theirs or class_map else ()
    return {"student_classes": mine, "teacher_classes": theirs, "class_map": class_map}


class ClassLoss(DistillationLoss):
    """
    Base of losses that compare class by class.

    Attributes:
        classes: which classes both networks know; None where they have the same ones in the same order.
    """

    compares_classes = True

    def __init__(
        self,
        *,
        student_classes: Sequence[str] = (),
        teacher_classes: Sequence[str] = (),
        class_map: Sequence = (),
        **kwargs,
    ):
        """
        Args:
            student_classes, teacher_classes, class_map: see :func:`match_classes`.
            kwargs: see :class:`DistillationLoss`.
        """
        super().__init__(**kwargs)
        self.classes: ClassMatch | None = None
        self._known = {
            "student_classes": tuple(student_classes),
            "teacher_classes": tuple(teacher_classes),
            "class_map": tuple(class_map),
        }

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return {**super().from_config(cfg, student, teacher), **known_classes(cfg, teacher)}

    def match(self, student: int, teacher: int) -> None:
        """Match so many classes of the student with so many of the teacher; see :func:`match_classes`."""
        try:
            self.classes = match_classes(student, teacher, **self._known)
        except ValueError as e:
            raise ValueError(
                f"{type(self).__name__} compares class by class: {e} Or leave it out of KD.LOSSES (--losses NST, for "
                f"example)."
            ) from None
