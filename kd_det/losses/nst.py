"""
NST, like what you like: neuron selectivity transfer: arXiv 1707.01219.

Shapes: S is (N, Cs, P) and T is (N, Ct, P), with P = H W positions. The samples between which the maximum mean
discrepancy is taken are the rows s_j and t_i, divided by their L2 norm (equation 4):
``mean_ii' k(t_i, t_i') + mean_jj' k(s_j, s_j') - 2 mean_ij k(t_i, s_j)``.
With all samples in one list z, and u = 1 / Cs for the student's and -1 / Ct for the teacher's, this is ``u' K u``.
"""

from typing import Optional, Tuple

import torch
from detectron2.config import configurable
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kd_det.errors import unknown_name
from kd_det.losses._products import SelfProduct, self_product
from kd_det.losses._spatial import full_precision, match_maps, unit_rows, within_range, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, NO_IMAGES
from kd_det.losses.regions import RegionsLoss

__all__ = ["NSTLoss", "nst_loss"]

_KERNELS = ("linear", "poly", "gaussian")


@full_precision
def nst_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: str = "poly",
    degree: int = 2,
    offset: float = 0.0,
    valid: Optional[Tensor] = None,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """
    Squared maximum mean discrepancy between the channels of both maps (equation 4), averaged over images. A channel,
    flattened and divided by its L2 norm over positions, is one sample; channel counts may differ.

    Args:
        student: (N, Cs, Hs, Ws).
        teacher: (N, Ct, Ht, Wt); is detached. The larger map is average-pooled to the smaller.
        kernel: "linear" ``x.y``; "poly" ``(x.y + offset)^degree``, the paper's choice for detection with degree 2 and
            offset 0; "gaussian" ``exp(-|x - y|^2 / (2 sigma^2))`` with sigma^2 the mean squared distance over the
            teacher-student pairs of the image, without gradient.
        degree, offset: of the poly kernel.
        valid: bool (N, 1, H, W) at either size: the positions that hold image.
        weights: float (N, 1, H, W) at either size: inner products, and so the L2 norm, are sums over positions with
            these weights.

    Returns:
        A scalar, never negative; 0 for an empty batch. The teacher-teacher term is part of it, so that 0 means equal.
        An all-zero channel is the zero vector and gets zero gradient.

    Raises:
        ValueError: an unknown kernel, a degree that is no positive integer; batches, types or a mask that do not fit.
    """
    if kernel not in _KERNELS:
        raise ValueError(f"nst_loss: {unknown_name('kernel', kernel, _KERNELS)}")
    if degree != int(degree) or degree < 1:
        raise ValueError(f"nst_loss: the degree must be a positive integer, found {degree}.")
    maps = match_maps("nst_loss", student, teacher, valid, weights=weights)
    if maps.empty:
        return zero_loss(maps.student)
    s, t = maps.student.flatten(2), maps.teacher.flatten(2)
    if maps.weights is not None:
        root = maps.weights.sqrt().flatten(2)
        s, t = s * root, t * root
    invalid = None if maps.invalid is None else maps.invalid.flatten(2)
    by_positions = kernel == "poly" and degree == 2 and offset == 0 and _positions_are_cheaper(s, t)
    if kernel == "linear" or by_positions:
        s, t = (unit_rows(x if invalid is None else x.masked_fill(invalid, 0)) for x in (s, t))
        return _linear_mmd(s, t) if kernel == "linear" else _square_mmd_by_positions(s, t)
    products = _UnitProducts.apply(s, t, invalid)
    cs, ct = s.shape[1], t.shape[1]
    values = _gaussian(products, cs) if kernel == "gaussian" else _poly(products, degree, offset)
    u = s.new_full((cs + ct,), 1 / cs)
    u[cs:].fill_(-1 / ct)
    loss = (values @ u @ u).mean()
    # For equal maps, rounding may give a value slightly below 0; only the value is clamped, not the gradient.
    return loss - loss.detach().clamp(max=0)


def _positions_are_cheaper(s: Tensor, t: Tensor) -> bool:
    """Whether P x P Grams take fewer multiplications, forward and backward, than the three blocks of channels."""
    cs, ct, p = s.shape[1], t.shape[1], s.shape[2]
    return p * (2 * cs + ct) < ct * ct + 2 * cs * cs + 2 * cs * ct


def _linear_mmd(s: Tensor, t: Tensor) -> Tensor:
    """The squared distance of the mean samples."""
    return (s.mean(1) - t.mean(1)).square().sum(1).mean()


def _square_mmd_by_positions(s: Tensor, t: Tensor) -> Tensor:
    """
    The poly kernel with d = 2 and c = 0 by the P x P Grams of positions, ``|s' s / Cs - t' t / Ct|_F^2``. They are
    smaller than those of channels on deep maps of many channels.
    """
    difference = SelfProduct.apply(s.mT) / s.shape[1] - self_product(t.mT) / t.shape[1]
    return difference.square().sum((1, 2)).mean()


class _UnitProducts(Function):
    """(N, Cs + Ct, Cs + Ct): inner products of all samples, and 0 with a dead channel."""

    @staticmethod
    def forward(ctx, s: Tensor, t: Tensor, invalid: Optional[Tensor]) -> Tensor:
        if invalid is not None:
            s, t = s.masked_fill(invalid, 0), t.masked_fill(invalid, 0)
        (s, t, gram), peak = within_range(_products, lambda out: _live_squares(out[2]), 2, s, t)
        # The maps are not normalised: 1 / |z_i| is applied to the small products.
        squares = gram.diagonal(dim1=1, dim2=2)
        inverse = squares.rsqrt().masked_fill_(squares <= 0, 0)[:, :, None]
        gram.mul_(inverse).mul_(inverse.mT)
        ctx.save_for_backward(s, t, gram, inverse, peak)
        return gram

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, grad: Tensor):
        s, t, gram, inverse, peak = ctx.saved_tensors
        student = slice(0, s.shape[1])
        weights = grad[:, student] + grad.mT[:, student]
        # The part of the gradient along the sample itself is lost in its normalisation.
        along = (weights * gram[:, student]).sum(2)
        weights.diagonal(dim1=1, dim2=2).sub_(along)
        weights.mul_(inverse[:, student] if peak is None else inverse[:, student] / peak[:, student])
        own, cross = weights.mul_(inverse.mT).split([s.shape[1], t.shape[1]], 2)
        return torch.bmm(own, s).baddbmm_(cross, t), None, None


def _products(s: Tensor, t: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Both sides, and the inner products of all samples, without a copy of the maps side by side."""
    cross = torch.bmm(s, t.mT)
    upper, lower = torch.cat([self_product(s), cross], 2), torch.cat([cross.mT, self_product(t)], 2)
    return s, t, torch.cat([upper, lower], 1)


def _live_squares(gram: Tensor) -> Tensor:
    """The squared norm of each channel, and 1 for a dead one, so that it can divide."""
    squares = gram.diagonal(dim1=1, dim2=2)
    return torch.where(squares == 0, 1, squares)


def _poly(products: Tensor, degree: int, offset: float) -> Tensor:
    return (products + offset if offset else products).pow(degree)


def _gaussian(products: Tensor, student_channels: int) -> Tensor:
    norms = products.detach().diagonal(dim1=1, dim2=2)  # squared: 1, or 0 for a dead channel
    distances = norms[:, None] + norms[:, :, None] - 2 * products
    sigma2 = distances.detach()[:, :student_channels, student_channels:].mean((1, 2), keepdim=True)
    # Where all samples are equal, sigma^2 is rounding error only, and must not scale the distances.
    return torch.exp(distances * (-0.5 / sigma2.clamp(min=16 * torch.finfo(products.dtype).eps)))


@DISTILLATION_LOSS_REGISTRY.register()
class NSTLoss(RegionsLoss):
    """:func:`nst_loss` summed over the pairs of taps. The channels of a pair may differ; no connector is needed."""

    name = "nst"

    @configurable
    def __init__(self, *, kernel: str = "poly", degree: int = 2, offset: float = 0.0, **kwargs):
        """
        Args:
            kernel, degree, offset: see :func:`nst_loss`.
            kwargs: see :class:`RegionsLoss`.
        """
        super().__init__(**kwargs)
        self.options = {"kernel": kernel, "degree": degree, "offset": offset}
        nst_loss(NO_IMAGES, NO_IMAGES, **self.options)  # checks the options

    @classmethod
    def from_config(cls, cfg, student, teacher):
        ret = super().from_config(cfg, student, teacher)
        node = cfg.KD.NST
        return {**ret, "kernel": node.KERNEL, "degree": node.DEGREE, "offset": node.OFFSET}

    def forward(self, student, teacher, context):
        return sum(
            nst_loss(s, t, valid=valid, weights=self.weights_at(s, context), **self.options)
            for s, t, valid in self.pairs(student, teacher, context)
        )
