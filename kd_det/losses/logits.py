"""What losses on class logits share: where the logits come from, and which of them are compared."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_det.features.regions import RegionHead
from kd_det.features.taps import tap_shape
from kd_det.losses.class_loss import ClassLoss

__all__ = ["LogitLoss"]


class LogitLoss(ClassLoss):
    """
    Base of losses on class logits: of the regions that the student samples, classified by both box heads, or, where
    taps are given, of those taps (the ``linear`` of a classifier, the ``head.cls_score`` of a dense head).

    Attributes:
        compares_sigmoids: whether the loss can compare classes that a dense head decides independently of each other.
        num_anchors: at such a head, the number A of anchors at a position of the (N, A K, H, W) logits; None elsewhere.
    """

    compares_sigmoids = False
    num_anchors: int | None = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.needs_regions = not self.student_taps

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        super().connect(student, teacher)
        name = type(self).__name__
        if not self.student_taps and not any(hasattr(network, "roi_heads") for network in (student, teacher)):
            raise ValueError(
                f"{name} without taps compares regions, and neither network has roi_heads; "
                f'KD.{self.name.upper()}.STUDENT_TAPS names the logits to compare, ("linear",) in a classifier.'
            )
        found = [
            _classes(network, taps, side)
            for network, taps, side in (
                (student, self.student_taps, "student"),
                (teacher, self.teacher_taps, "teacher"),
            )
        ]
        for (have, sigmoids), (want, teacher_sigmoids) in zip(*found):
            self.match(sigmoids or have, teacher_sigmoids or want)
            if bool(sigmoids) != bool(teacher_sigmoids) or sigmoids and have // sigmoids != want // teacher_sigmoids:
                raise ValueError(
                    f"{name} compares class by class: the student has {have} channels of logits for {sigmoids or have} "
                    f"classes and the teacher {want} for {teacher_sigmoids or want}; expected sigmoids of both or of "
                    f"neither, with as many anchors."
                )
            if sigmoids and not self.compares_sigmoids:
                raise ValueError(
                    f"{name} compares softmaxes, and the dense head of {type(student).__name__} decides {sigmoids} "
                    f"classes by sigmoids of their own: distil it by SoftTargetLoss, and drop {name} from KD.LOSSES."
                )
            self.num_anchors = have // sigmoids if sigmoids else None

    def logit_pairs(
        self, student: list[Tensor], teacher: list[Tensor], context
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """
        Student's and teacher's logits (N, K, ...) of the classes that both know, and the mask (N, 1, ...) of those that
        hold image (None: all), once for each stage of the box head or each map. The levels of a dense head with
        sigmoids are one pair: (N, A K, P) with the P positions of all levels.
        """
        pairs = self._pairs_of_all_classes(student, teacher, context)
        if self.classes is None:
            return pairs
        options = {"background": self.needs_regions, "num_anchors": self.num_anchors or 1}
        return [(*self.classes.logits(s, t, **options), valid) for s, t, valid in pairs]

    def _pairs_of_all_classes(self, student: list[Tensor], teacher: list[Tensor], context) -> list[tuple]:
        if self.needs_regions:
            return [(s.logits, t.logits, None) for s, t in context.region_pairs()]
        pairs = self.pairs(student, teacher, context)
        if self.num_anchors is None:
            return pairs
        students, teachers, valid = zip(*pairs)
        if any(mask is not None for mask in valid):
            whole = [torch.ones_like(s[:, :1], dtype=torch.bool) for s in students]
            valid = [torch.cat([(w if v is None else v).flatten(2) for v, w in zip(valid, whole)], dim=2)]
        return [(*(torch.cat([x.flatten(2) for x in levels], dim=2) for levels in (students, teachers)), valid[0])]


def _classes(network: nn.Module, taps: Sequence[str], side: str) -> list[tuple[int, int | None]]:
    """
    The number of classes to compare at each tap (of regions, without taps), and K where they are sigmoids.

    RetinaNet and FCOS have A K channels and none for the background, which is where all K sigmoids of a head are low;
    a softmax would need K + 1 channels.
    """
    if not taps:
        return [(RegionHead(getattr(network, "roi_heads", None), side=side).num_classes, None)]
    is_dense = hasattr(network, "head_in_features")
    classes = getattr(network, "num_classes", None) if is_dense else None
    channels = [tap_shape(network, tap, side=side).channels for tap in taps]
    return [(c, classes if classes and c % classes == 0 else None) for c in channels]
