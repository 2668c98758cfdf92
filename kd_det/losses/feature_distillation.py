"""FD, contrastive learning rivals masked image modeling in fine-tuning via feature distillation: arXiv 2205.14141."""

from typing import Optional, Tuple

import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.features.taps import deepest_level, tap_names
from kd_det.losses._spatial import full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, NO_IMAGES
from kd_det.losses.connected import ConnectedLoss
from kd_det.losses.regions import RegionsLoss

__all__ = ["FeatureDistillationLoss", "feature_distillation_loss"]


@full_precision
def feature_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 2.0,
    valid: Optional[Tensor] = None,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """
    Smooth L1 distance to the whitened teacher (arXiv 2205.14141, equation 1): ``d^2 / (2 beta)`` where ``|d| <= beta``
    and ``|d| - beta / 2`` elsewhere, for ``d = student - whiten(teacher)``, averaged over channels, valid positions and
    images. ``whiten`` is a layer norm without affine: the channels of a position get mean 0 and variance 1, so that one
    weight and one beta serve teachers of any scale. Hints (:func:`kd_det.losses.hint_loss`) take the square, and the
    teacher's map as it is. The published code compares the tokens of one grid; here the larger map is pooled first.

    Args:
        student: (N, C, Hs, Ws), behind a connector.
        teacher: (N, C, Ht, Wt); is detached. The larger map is average-pooled to the smaller.
        beta: positive.
        valid: bool (N, 1, H, W) at either size: the positions that hold image.
        weights: float (N, 1, H, W) at either size, scaled to a mean of 1 in each image: the mean is weighted.

    Returns:
        A scalar; 0 for an empty batch. A constant position is whitened to zeros.

    Raises:
        ValueError: batches, channels, types or a mask that do not fit, or a beta that is not positive.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"feature_distillation_loss: beta must be a positive number, found {beta}.")
    maps = match_maps("feature_distillation_loss", student, teacher, valid, same_channels=True, weights=weights)
    if maps.empty:
        return zero_loss(maps.student)
    target = F.layer_norm(maps.teacher.movedim(1, -1), maps.teacher.shape[1:2]).movedim(-1, 1)
    student, ignored = maps.student, maps.invalid if maps.weights is None else maps.weights == 0
    if ignored is not None:
        student, target = student.masked_fill(ignored, 0), target.masked_fill(ignored, 0)
    distances = F.smooth_l1_loss(student, target, beta=beta, reduction="none").mean(1, keepdim=True)
    if maps.weights is not None:
        distances = distances * maps.weights
    return (distances.sum((1, 2, 3)) / maps.positions()).mean()


def _levels_in_common(student: nn.Module, teacher: nn.Module) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    names = set(tap_names(student)) & set(tap_names(teacher))
    levels, deepest = tuple(level for level in ("res3", "res4", "res5") if level in names), deepest_level(student)
    return (levels, levels) if deepest in levels else ((deepest,), (deepest_level(teacher),))


@DISTILLATION_LOSS_REGISTRY.register()
class FeatureDistillationLoss(RegionsLoss, ConnectedLoss):
    """
    :func:`feature_distillation_loss` after a connector from the student's channels to the teacher's (the paper's 1x1
    convolution), summed over taps. In a config without taps, these are res3 to res5, as far as both networks have them;
    and the deepest level of each alone where the teacher has none like the student's (a ViT, as in the paper).
    """

    name = "fd"
    connects_equal_channels = True

    @configurable
    def __init__(self, *, beta: float = 2.0, **kwargs):
        """
        Args:
            beta: see :func:`feature_distillation_loss`.
            kwargs: see :class:`ConnectedLoss` and :class:`RegionsLoss`.
        """
        super().__init__(**kwargs)
        self.beta = beta
        feature_distillation_loss(NO_IMAGES, NO_IMAGES, beta=beta)  # checks the option

    @classmethod
    def from_config(cls, cfg, student, teacher):
        node = cfg.KD.FD
        ret = {**super().from_config(cfg, student, teacher), "beta": node.BETA}
        if not node.STUDENT_TAPS and not node.TEACHER_TAPS:
            ret["student_taps"], ret["teacher_taps"] = _levels_in_common(student, teacher)
        return ret

    def forward(self, student, teacher, context):
        pairs = self.connected_pairs(student, teacher, context)
        return sum(
            feature_distillation_loss(s, t, beta=self.beta, valid=valid, weights=self.weights_at(s, context))
            for s, t, valid in pairs
        )
