"""
OFD, a comprehensive overhaul of feature distillation: arXiv 1904.01866. All maps are pre-activation.
"""

import logging
import math
from collections.abc import Sequence
from typing import Optional

import torch
from detectron2.config import configurable
from detectron2.utils import comm
from torch import Tensor, nn

from kd_det.errors import unknown_name
from kd_det.losses._blocks import squared_residuals
from kd_det.losses._spatial import Maps, full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY
from kd_det.losses.connected import ConnectedLoss
from kd_det.losses.margin import Margin, margin_from_norm, margin_relu, norm_behind
from kd_det.losses.regions import RegionsLoss

__all__ = ["OverhaulLoss", "overhaul_loss", "partial_l2_loss"]

logger = logging.getLogger(__name__)

_REDUCTIONS = ("position", "sum")


@full_precision
def partial_l2_loss(
    student: Tensor,
    target: Tensor,
    *,
    reduction: str = "position",
    valid: Optional[Tensor] = None,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """
    Partial L2 distance (equation 3): ``(T - S)^2``, but 0 where ``S <= T <= 0``.

    Args:
        student: (N, C, Hs, Ws), pre-activation, behind a connector.
        target: (N, C, Ht, Wt), see :func:`margin_relu`; is detached. The larger map is average-pooled to the smaller.
        reduction: "position" divides each image's sum by its number of valid positions (not by its channels) and
            averages over images, so that the weight does not depend on the image's size; "sum" is the published sum
            over everything.
        valid: bool (N, 1, H, W) at either size: the positions that hold image.
        weights: float (N, 1, H, W) at either size, scaled to a mean of 1 in each image, of the squared distances.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: an unknown reduction; batches, channels, types or a mask that do not fit.
    """
    _check_reduction("partial_l2_loss", reduction)
    maps = match_maps("partial_l2_loss", student, target, valid, same_channels=True, weights=weights)
    return _distance(maps, reduction, _partial_residual)


@full_precision
def overhaul_loss(
    student: Tensor,
    teacher: Tensor,
    margin: Tensor,
    *,
    reduction: str = "position",
    valid: Optional[Tensor] = None,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """
    ``partial_l2_loss(student, margin_relu(teacher, margin))`` in one pass, which keeps no margin-ReLU'd map.

    Args:
        teacher: (N, C, Ht, Wt), pre-activation; is detached. Where the sizes differ, the margin comes before pooling.
        margin: (C,).
        student, reduction, valid, weights: see :func:`partial_l2_loss`.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: as :func:`partial_l2_loss` and :func:`margin_relu`.
    """
    _check_reduction("overhaul_loss", reduction)
    if student.shape[2:] != teacher.shape[2:]:
        teacher = margin_relu(teacher, margin)
    maps = match_maps("overhaul_loss", student, teacher, valid, same_channels=True, weights=weights)
    if margin.shape != (maps.teacher.shape[1],):
        raise ValueError(
            f"overhaul_loss: needs one margin for each of {maps.teacher.shape[1]} channels, found margins of shape "
            f"{tuple(margin.shape)}."
        )
    margin = margin.detach().to(maps.teacher)[:, None, None]

    def residual(student: Tensor, teacher: Tensor, channels: slice, out: Tensor, scratch: Tensor) -> Tensor:
        target = torch.maximum(teacher, margin[channels], out=scratch)
        return _partial_residual(student, target, channels, out, scratch)

    return _distance(maps, reduction, residual)


def _check_reduction(name: str, reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}: unknown reduction {reduction!r}. Valid names: {', '.join(_REDUCTIONS)}.")


def _distance(maps: Maps, reduction: str, residual) -> Tensor:
    if maps.empty:
        return zero_loss(maps.student)
    counts = maps.positions()
    factors = torch.ones_like(counts) if reduction == "sum" else (len(counts) * counts).reciprocal()
    return squared_residuals(maps, residual, factors)


def _partial_residual(student: Tensor, target: Tensor, channels: slice, out: Tensor, scratch: Tensor) -> Tensor:
    # The residual is S - T, and where T <= 0 not less than 0. A lower bound in floats does it, 0 where T <= 0 and far
    # below any difference elsewhere, because a chain of masks takes several times as long.
    torch.sub(student, target, out=out)
    bound = torch.clamp(target, min=0, out=scratch).mul_(-torch.finfo(out.dtype).max)
    return torch.maximum(out, bound, out=out)


@DISTILLATION_LOSS_REGISTRY.register()
class OverhaulLoss(RegionsLoss, ConnectedLoss):
    """
    :func:`overhaul_loss` after a connector (1x1 convolution, norm), summed over the pairs of taps with the factor
    2^-(L-l), 1 for the last. Taps are pre-activations, shallow to deep.
    """

    name = "overhaul"
    connects_equal_channels = True

    @configurable
    def __init__(
        self,
        *,
        margin: str | Sequence[tuple[Tensor, Tensor]] = "calibrated",
        calibration_images: int = 64,
        connector_norm: str = "BN",
        reduction: str = "position",
        **kwargs,
    ):
        """
        Args:
            margin: "calibrated": the mean of the negative responses to the first ``calibration_images`` training images
                of all ranks, measured in the steps that train on them (or see :meth:`kd_det.Distiller.calibrate`).
                "running": to all images so far. Or (weight, bias) of the norm layer behind each teacher tap, for the
                closed form of :func:`margin_from_norm`.
            calibration_images: see ``margin``.
            connector_norm: a norm of Detectron2: "BN", as in the paper, "SyncBN", ...
            reduction: see :func:`overhaul_loss`; "sum" is over the images of all ranks.
            kwargs: see :class:`ConnectedLoss`.
        """
        super().__init__(connector_norm=connector_norm, **kwargs)
        _check_reduction(type(self).__name__, reduction)
        if isinstance(margin, str) and margin not in ("calibrated", "running"):
            raise ValueError(
                f"OverhaulLoss: margin must be 'calibrated', 'running' or the norms' parameters, found {margin!r}."
            )
        if calibration_images < 1:
            raise ValueError(f"OverhaulLoss: calibration_images must be at least 1, found {calibration_images}.")
        self.reduction = reduction
        wanted = {"calibrated": calibration_images, "running": math.inf}
        self.calibration_images = wanted[margin] if isinstance(margin, str) else 0
        # How many images the margins were measured on: in a buffer, to be saved, and as a number of the host, which
        # can be compared without waiting for a device.
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))
        self._observed = 0
        self._closed_form = None if isinstance(margin, str) else margin
        self.needs_one_teacher = self._closed_form is not None
        if self._is_built:
            self._set_closed_form()

    def build(self, student_channels, teacher_channels):
        super().build(student_channels, teacher_channels)
        self.margins = nn.ModuleList(Margin(channels) for channels in teacher_channels)

    def connect(self, student, teacher):
        super().connect(student, teacher)
        self._set_closed_form()

    def _set_closed_form(self) -> None:
        for margin, (weight, bias) in zip(self.margins, self._closed_form or ()):
            margin.value.copy_(margin_from_norm(weight, bias))

    @classmethod
    def from_config(cls, cfg, student, teacher):
        ret = super().from_config(cfg, student, teacher)
        node = cfg.KD.OVERHAUL
        if node.MARGIN not in ("calibrated", "norm", "running"):
            raise ValueError(unknown_name("KD.OVERHAUL.MARGIN", node.MARGIN, ("calibrated", "norm", "running")))
        margin = node.MARGIN
        if margin == "norm":
            taps = ret["teacher_taps"] or ret["student_taps"]
            margin = [norm_behind(teacher, tap) for tap in taps]
        return {
            **ret,
            "margin": margin,
            "calibration_images": node.CALIBRATION_IMAGES,
            "reduction": node.REDUCTION,
        }

    def observe(self, teacher, context):
        if self._observed >= self.calibration_images:
            return
        for margin, features in zip(self.margins, teacher):
            margin.observe(features, context.valid(features))
        self._observed += len(context.image_sizes) * comm.get_world_size()
        self.observed.fill_(self._observed)
        if self._observed >= self.calibration_images:
            self._report_calibration()

    def _report_calibration(self) -> None:
        never = [tap for tap, margin in zip(self.teacher_taps, self.margins) if not bool(margin.count.any())]
        if never:
            logger.warning(
                f"{type(self).__name__}: the teacher is never negative at {', '.join(never)}, so the margin there is "
                f"0. OFD reads pre-activations, such as 'res4.pre_activation'."
            )
        logger.info(f"{type(self).__name__}: margins calibrated on {self._observed} images.")

    def upgrade_state(self, state):
        if "observed" not in state:  # kd_det 0.1.0 calibrated before the first step
            calibrated = any(value.any() for key, value in state.items() if key.endswith("count"))
            wanted = self.calibration_images if math.isfinite(self.calibration_images) else 1
            state = {**state, "observed": torch.tensor(wanted if calibrated else 0)}
        return state

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._observed = int(self.observed)

    def forward(self, student, teacher, context):
        self.observe(teacher, context)
        total = 0.0
        for level, (s, t, valid) in enumerate(self.connected_pairs(student, teacher, context)):
            options = {"reduction": self.reduction, "valid": valid, "weights": self.weights_at(s, context)}
            term = overhaul_loss(s, t, self.margins[level].value, **options)
            total = total + term * 2.0 ** (level + 1 - len(self.connectors))
        # DDP averages over ranks: a sum over the images of all ranks is as many times a rank's own.
        return total * comm.get_world_size() if self.reduction == "sum" else total
