"""Teacher-bounded box regression: Chen et al., NIPS 2017."""

from typing import Optional

import torch
from detectron2.config import configurable
from torch import Tensor

from kd_det.features.regions import RegionHead
from kd_det.losses._ranks import share_of_samples
from kd_det.losses._spatial import full_precision, to_float, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.class_loss import ClassLoss

__all__ = ["BoundedRegressionLoss", "bounded_regression_loss"]


@full_precision
def bounded_regression_loss(
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    target_deltas: Tensor,
    *,
    margin: float = 0.0,
    foreground: Optional[Tensor] = None,
) -> Tensor:
    """
    The teacher as an upper bound of the student's error in box regression (Chen et al., Learning efficient object
    detection models with knowledge distillation, NIPS 2017, equation 4): per region ``|s - y|^2`` if
    ``|s - y|^2 + margin > |t - y|^2``, else 0. The sum is divided by R, as the paper and Detectron2 divide a box loss
    by all sampled regions, foreground or not.

    Args:
        student_deltas: (R, 4), what the student predicts for R regions, of the region's class.
        teacher_deltas: (R, 4), the teacher's for the same regions, in the same units; is detached.
        target_deltas: (R, 4), those of the ground truth.
        margin: m >= 0, by how much of squared error the student must be better than the teacher to be left alone.
        foreground: bool (R,), the regions whose errors are summed; None: all.

    Returns:
        A scalar; 0 for no region.

    Raises:
        ValueError: shapes that differ, or a negative margin.
    """
    name = "bounded_regression_loss"
    if not student_deltas.shape == teacher_deltas.shape == target_deltas.shape or student_deltas.dim() != 2:
        raise ValueError(
            f"{name}: student, teacher and target must all be (R, 4), found shapes {tuple(student_deltas.shape)}, "
            f"{tuple(teacher_deltas.shape)} and {tuple(target_deltas.shape)}."
        )
    if not margin >= 0:
        raise ValueError(f"{name}: the margin must be a number >= 0, found {margin}.")
    student, teacher = to_float(name, student_deltas, teacher_deltas)
    _, target = to_float(name, student_deltas, target_deltas)
    if student.numel() == 0:
        return zero_loss(student)
    error = (student - target).square().sum(1)
    bound = (teacher - target).square().sum(1)
    counts = error + margin > bound
    if foreground is not None:
        counts = counts & foreground
    return torch.where(counts, error, 0).mean()


@DISTILLATION_LOSS_REGISTRY.register()
class BoundedRegressionLoss(ClassLoss):
    """
    :func:`bounded_regression_loss` on the foreground regions that the student samples, labelled by the student's own
    matcher, in the student's units of box regression; divided by the sampled regions of all processes. Regions of a
    class that the teacher does not know add nothing, unless both networks regress boxes whatever their class. Reads no
    taps.
    """

    name = "bounded_regression"
    needs_regions = True
    needs_labels = True

    @configurable
    def __init__(self, *, margin: float = 0.0, **kwargs):
        """
        Args:
            margin: m of :func:`bounded_regression_loss`.
            kwargs: see :class:`DistillationLoss`.
        """
        super().__init__(**kwargs)
        no_regions = torch.empty(0, 4)
        bounded_regression_loss(no_regions, no_regions, no_regions, margin=margin)  # checks the option
        self.margin = margin

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return {**super().from_config(cfg, student, teacher), "margin": cfg.KD.BOUNDED_REGRESSION.MARGIN}

    def connect(self, student, teacher):
        super().connect(student, teacher)
        heads = [
            RegionHead(getattr(network, "roi_heads", None), side=side)
            for network, side in ((student, "student"), (teacher, "teacher"))
        ]
        if not all(head.is_class_agnostic for head in heads):
            self.match(*(head.num_classes for head in heads))

    def forward(self, student, teacher, context):
        pairs = context.region_pairs()
        total = 0.0
        for stage, (s, t) in enumerate(pairs):
            targets = theirs = context.region_targets(stage)
            if self.classes is not None:
                theirs = self.classes.targets_of_teacher(targets)
            units = zip(theirs.of_class(t.deltas).unbind(1), context.teacher_units(stage))
            mean = bounded_regression_loss(
                targets.of_class(s.deltas),
                torch.stack([deltas * unit for deltas, unit in units], dim=1),
                targets.deltas,
                margin=self.margin,
                foreground=theirs.foreground,
            )
            total = total + share_of_samples(len(s.deltas), s.deltas.device) * mean
        return total / len(pairs)
