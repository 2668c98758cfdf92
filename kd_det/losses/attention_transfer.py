"""AT, paying more attention to attention: arXiv 1612.03928."""

from typing import Optional

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from kd_det.losses._blocks import SquaredResidual
from kd_det.losses._spatial import Maps, full_precision, match_maps, to_float, within_range, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, NO_IMAGES
from kd_det.losses.regions import RegionsLoss

__all__ = ["AttentionTransferLoss", "attention_map", "attention_transfer_loss", "gradient_attention_loss"]

_MAPPINGS = ("sum", "sum_pow", "max_pow")
_REDUCTIONS = ("image", "element")


@full_precision
def attention_map(features: Tensor, *, mapping: str = "sum_pow", p: float = 2) -> Tensor:
    """
    The spatial attention map of (N, C, H, W) features (section 3.1), unnormalised: per position ``sum_c |A_c|``
    ("sum"), ``sum_c |A_c|^p`` ("sum_pow") or ``max_c |A_c|^p`` ("max_pow").

    Args:
        features: (N, C, H, W), of any sign.
        mapping: one of the three.
        p: the power, at least 1. "sum" is "sum_pow" with p = 1.

    Returns:
        (N, H, W), differentiable once.

    Raises:
        ValueError: features of another shape or type, an unknown mapping, or p < 1.
    """
    p = _power("attention_map", mapping, p)
    if features.dim() != 4 or not features.is_floating_point():
        raise ValueError(
            f"attention_map: the features must be floating-point (N, C, H, W), found {features.dtype} of shape "
            f"{tuple(features.shape)}."
        )
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if features.numel() == 0:
        return features.sum(1)
    return _attention(features, mapping, p)


@full_precision
def attention_transfer_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mapping: str = "sum_pow",
    p: float = 2,
    reduction: str = "image",
    valid: Optional[Tensor] = None,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """
    ``| Q_S / |Q_S|_2 - Q_T / |Q_T|_2 |_2^2`` between flattened attention maps Q, see :func:`attention_map`; at most 4.

    The paper (equation 2) takes the norm, not its square, and its published code the mean of the squares over
    positions as well, which shrinks the loss by H W. Here positions are summed, so that one weight serves every level;
    the published value is ``reduction="element"``.

    Args:
        student: (N, Cs, Hs, Ws).
        teacher: (N, Ct, Ht, Wt); is detached. The larger map is average-pooled to the smaller.
        mapping, p: see :func:`attention_map`.
        reduction: "image": summed over positions, averaged over images; "element": averaged over both.
        valid: bool (N, 1, H, W) at either size: the positions that hold image.
        weights: float (N, 1, H, W) at either size, scaled to a mean of 1 in each image: sums over positions, those of
            the norms too, are weighted.

    Returns:
        A scalar; 0 for an empty batch. A map that is all zeros counts as the zero vector, with zero gradient.

    Raises:
        ValueError: an unknown mapping or reduction, p < 1; batches, types or a mask that do not fit.
    """
    name = "attention_transfer_loss"
    p = _power(name, mapping, p)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}: unknown reduction {reduction!r}. Valid names: {', '.join(_REDUCTIONS)}.")
    maps = match_maps(name, student, teacher, valid, weights=weights)
    if maps.empty:
        return zero_loss(maps.student)
    student, teacher = (_unit_attention(x, mapping, p, maps) for x in (maps.student, maps.teacher))
    if reduction == "image":
        return F.mse_loss(student, teacher, reduction="sum") / len(student)
    return ((student - teacher).square().sum(1) / maps.positions()).mean()


@full_precision
def gradient_attention_loss(student_input_grad: Tensor, teacher_input_grad: Tensor) -> Tensor:
    """
    Gradient-based attention transfer (section 3.2): ``|J_S - J_T|_2^2`` per image, averaged over images, where J is the
    gradient of the task loss at the network's input, with the same labels for both.

    Args:
        student_input_grad: (N, ...), computed with ``create_graph=True``.
        teacher_input_grad: of the same shape; is detached.

    Returns:
        A scalar; 0 for an empty batch. It can be differentiated as often as ``student_input_grad`` can.

    Raises:
        ValueError: shapes that differ.
    """
    student, teacher = to_float("gradient_attention_loss", student_input_grad, teacher_input_grad)
    if student.dim() == 0 or student.shape != teacher.shape:
        raise ValueError(
            f"gradient_attention_loss: both gradients must have one shape (N, ...), found {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    if student.numel() == 0:
        return zero_loss(student)
    return (student - teacher).square().sum() / student.shape[0]


def _power(name: str, mapping: str, p: float) -> float:
    if mapping not in _MAPPINGS:
        raise ValueError(f"{name}: unknown mapping {mapping!r}. Valid names: {', '.join(_MAPPINGS)}.")
    if not 1 <= p < float("inf"):
        raise ValueError(f"{name}: p must be a number >= 1, found {p}.")
    return 1 if mapping == "sum" else p


def _attention(x: Tensor, mapping: str, p: float) -> Tensor:
    """(N, H, W), see :func:`attention_map`."""
    if mapping == "max_pow":
        return x.abs().amax(1).pow(p)
    if p == 2:
        return SquaredResidual.apply(x, None, lambda student, *_: student, None)
    if p == 1:
        return torch.linalg.vector_norm(x, 1, 1)  # writes no map of magnitudes
    return x.abs().pow(p).sum(1)


def _unit_attention(x: Tensor, mapping: str, p: float, maps: Maps) -> Tensor:
    """(N, H W): the attention map, times the roots of the weights, divided by its norm; zeros for one without any."""
    if maps.invalid is not None:
        x = x.masked_fill(maps.invalid, 0)
    q, _ = within_range(lambda x: _attention(x, mapping, p).flatten(1), lambda q: q.amax(1), (1, 2, 3), x)
    if maps.weights is not None:
        q = q * maps.weights.sqrt().flatten(1)
    # Nothing beside a live image's norm; of a dead one, the quotient and its gradient are 0.
    return q / (torch.linalg.vector_norm(q, dim=1, keepdim=True) + 1e-30)


@DISTILLATION_LOSS_REGISTRY.register()
class AttentionTransferLoss(RegionsLoss):
    """:func:`attention_transfer_loss` summed over the pairs of taps. Attention has no channels: no connector."""

    name = "at"

    @configurable
    def __init__(self, *, mapping: str = "sum_pow", p: float = 2, reduction: str = "image", **kwargs):
        """
        Args:
            mapping, p, reduction: see :func:`attention_transfer_loss`.
            kwargs: see :class:`RegionsLoss`.
        """
        super().__init__(**kwargs)
        self.options = {"mapping": mapping, "p": p, "reduction": reduction}
        attention_transfer_loss(NO_IMAGES, NO_IMAGES, **self.options)  # checks the options

    @classmethod
    def from_config(cls, cfg, student, teacher):
        ret = super().from_config(cfg, student, teacher)
        node = cfg.KD.AT
        return {**ret, "mapping": node.MAPPING, "p": node.P, "reduction": node.REDUCTION}

    def forward(self, student, teacher, context):
        return sum(
            attention_transfer_loss(s, t, valid=valid, weights=self.weights_at(s, context), **self.options)
            for s, t, valid in self.pairs(student, teacher, context)
        )
