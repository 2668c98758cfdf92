"""Hints: FitNets, arXiv 1412.6550."""

from typing import Optional

from torch import Tensor

from kd_det.losses._blocks import squared_error
from kd_det.losses._spatial import full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.connected import ConnectedLoss
from kd_det.losses.regions import RegionsLoss

__all__ = ["HintLoss", "hint_loss"]


@full_precision
def hint_loss(
    student: Tensor, teacher: Tensor, *, valid: Optional[Tensor] = None, weights: Optional[Tensor] = None
) -> Tensor:
    """
    Mean squared error over channels and valid positions, averaged over images. FitNets (arXiv 1412.6550), equation 3,
    takes half the squared norm; the mean is used so that one weight serves every size.

    Args:
        student: (N, C, Hs, Ws), behind a connector.
        teacher: (N, C, Ht, Wt); is detached. The larger map is average-pooled to the smaller.
        valid: bool (N, 1, H, W) at either size: the positions that hold image.
        weights: float (N, 1, H, W) at either size, scaled to a mean of 1 in each image: the mean is weighted.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: batches, channels, types or a mask that do not fit.
    """
    maps = match_maps("hint_loss", student, teacher, valid, same_channels=True, weights=weights)
    if maps.empty:
        return zero_loss(maps.student)
    n, c = maps.student.shape[:2]
    return squared_error(maps, (n * c * maps.positions()).reciprocal())


@DISTILLATION_LOSS_REGISTRY.register()
class HintLoss(RegionsLoss, ConnectedLoss):
    """:func:`hint_loss` after a connector from the student's channels to the teacher's, summed over taps."""

    name = "hint"
    connects_equal_channels = True

    def forward(self, student, teacher, context):
        pairs = self.connected_pairs(student, teacher, context)
        return sum(hint_loss(s, t, valid=valid, weights=self.weights_at(s, context)) for s, t, valid in pairs)
