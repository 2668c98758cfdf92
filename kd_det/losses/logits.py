"""What losses on class logits share: where the logits come from, and that both networks have the same classes."""

from detectron2.config import CfgNode
from torch import Tensor, nn

from kd_det.features.regions import RegionHead
from kd_det.features.taps import tap_shape
from kd_det.losses.build import DistillationLoss

__all__ = ["LogitLoss"]


class LogitLoss(DistillationLoss):
    """
    Base of losses on class logits: of the regions that the student samples, classified by both box heads, or, where
    taps are given, of those taps (the ``linear`` of a classifier, the ``head.cls_score`` of a dense head).
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.needs_regions = not self.student_taps

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module, teacher: nn.Module) -> dict:
        ret = super().from_config(cfg, student, teacher)
        if ret["student_taps"]:
            pairs = zip(ret["student_taps"], ret["teacher_taps"] or ret["student_taps"])
            counts = [
                (tap_shape(student, s, side="student").channels, tap_shape(teacher, t, side="teacher").channels)
                for s, t in pairs
            ]
        else:
            if not any(hasattr(network, "roi_heads") for network in (student, teacher)):
                raise ValueError(
                    f"{cls.__name__} without taps compares regions, and neither network has roi_heads; "
                    f'KD.{cls.name.upper()}.STUDENT_TAPS names the logits to compare, ("linear",) in a classifier.'
                )
            counts = [
                tuple(
                    RegionHead(getattr(network, "roi_heads", None), side=side).num_classes
                    for network, side in ((student, "student"), (teacher, "teacher"))
                )
            ]
        for have, want in counts:
            if have != want:
                raise ValueError(
                    f"{cls.__name__} compares class by class: the student has {have} classes and the teacher {want}. "
                    f"Make their numbers of classes equal (MODEL.ROI_HEADS.NUM_CLASSES in an R-CNN), or drop it from "
                    f"KD.LOSSES."
                )
        return ret

    def logit_pairs(self, student: list[Tensor], teacher: list[Tensor], context) -> list[tuple[Tensor, Tensor]]:
        """Student's and teacher's logits, once for each stage of the box head or each map."""
        if self.needs_regions:
            return [(s.logits, t.logits) for s, t in context.region_pairs()]
        return [(s, t) for s, t, _ in self.pairs(student, teacher, context)]
