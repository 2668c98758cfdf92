"""
NST, like what you like: neuron selectivity transfer: arXiv 1707.01219.

Shapes: S is (N, Cs, P) and T is (N, Ct, P), with P = H W positions. s_j and t_i are their rows divided by their L2
norm, the samples between which the maximum mean discrepancy is taken (equation 4):
``mean_ii' k(t_i, t_i') + mean_jj' k(s_j, s_j') - 2 mean_ij k(t_i, s_j)``.

The maps themselves are never normalised: 1 / |S_j| is applied to the small products of row j instead.
"""

from typing import Callable, Iterator, Optional, Tuple

import torch
from detectron2.config import configurable
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kd_det.errors import unknown_name
from kd_det.losses._products import self_product
from kd_det.losses._spatial import full_precision, match_maps, zero_loss
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, NO_IMAGES, DistillationLoss

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
    maps = match_maps("nst_loss", student, teacher, valid)
    if maps.empty:
        return zero_loss(maps.student)
    s, t = maps.student.flatten(2), maps.teacher.flatten(2)
    invalid = None if maps.invalid is None else maps.invalid.flatten(2)
    if kernel == "linear":
        return _LinearMMD.apply(s, t, invalid)
    if kernel == "poly" and degree == 2 and offset == 0 and _positions_are_cheaper(s, t):
        return _SquareMMD.apply(s, t, invalid)
    return _GramMMD.apply(s, t, invalid, _poly(degree, offset) if kernel == "poly" else _gaussian)


def _positions_are_cheaper(s: Tensor, t: Tensor) -> bool:
    """By multiplications of forward and backward: of P x P Grams, or of the three blocks of channels."""
    cs, ct, p = s.shape[1], t.shape[1], s.shape[2]
    return p * (2 * cs + ct) < ct * ct + 2 * cs * cs + 2 * cs * ct


def _prepare(x: Tensor, invalid: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
    """
    Zeros the invalid positions, and brings channels whose squares would leave float32's range to a peak of 1.

    Returns:
        The map, and the factors (N, C, 1) it was multiplied by, if any.
    """
    if invalid is not None:
        x = x.masked_fill(invalid, 0)
    peak = torch.maximum(x.amax(2, keepdim=True), -x.amin(2, keepdim=True))
    if not ((peak > 0) & ((peak < 1e-12) | (peak > 1e12))).any():
        return x, None
    factor = torch.where(peak > torch.finfo(x.dtype).tiny, 1 / peak, 0)
    return x * factor, factor


def _inverse_norms(x: Tensor) -> Tensor:
    """(N, C, 1): 1 / |x_c|, and 0 for a dead channel."""
    norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    return torch.where(norm > 0, 1 / norm, 0)


class _LinearMMD(Function):
    """The linear kernel is the squared distance of the mean samples; no Gram is needed."""

    @staticmethod
    def forward(ctx, s: Tensor, t: Tensor, invalid: Optional[Tensor]) -> Tensor:
        (s, factor), (t, _) = _prepare(s, invalid), _prepare(t, invalid)
        rs, rt = _inverse_norms(s), _inverse_norms(t)
        difference = torch.bmm(rs.mT, s) / s.shape[1] - torch.bmm(rt.mT, t) / t.shape[1]
        ctx.save_for_backward(s, factor, rs, difference)
        return difference.square().sum() / len(s)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, grad: Tensor):
        s, factor, rs, difference = ctx.saved_tensors
        slope = difference * (2 * grad / (s.shape[0] * s.shape[1]))
        along = torch.bmm(s, slope.mT) * rs
        out = s * (-along * rs.square())
        out.baddbmm_(rs, slope)
        return _descale(out, factor), None, None


class _SquareMMD(Function):
    """
    The poly kernel with d = 2 and c = 0 by the P x P Grams of positions: ``|s's / Cs - t't / Ct|_F^2``, where s' is the
    transpose. It is smaller than the Grams of channels on deep maps of many channels.
    """

    @staticmethod
    def forward(ctx, s: Tensor, t: Tensor, invalid: Optional[Tensor]) -> Tensor:
        (s, factor), (t, _) = _prepare(s, invalid), _prepare(t, invalid)
        rs = _inverse_norms(s)
        difference = torch.bmm((s * rs.square()).mT, s)
        rt = _inverse_norms(t)
        difference.baddbmm_((t * rt.square()).mT, t, beta=1 / s.shape[1], alpha=-1 / t.shape[1])
        ctx.save_for_backward(s, factor, rs, difference)
        return difference.square().sum() / len(s)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, grad: Tensor):
        s, factor, rs, difference = ctx.saved_tensors
        out = torch.bmm(s, difference)
        # The part of the gradient along the sample itself is lost in its normalisation.
        along = (out * s).sum(2, keepdim=True) * rs.square()
        out.addcmul_(s, along, value=-1)
        out.mul_(rs.square() * (4 * grad / (s.shape[0] * s.shape[1])))
        return _descale(out, factor), None, None


# A kernel as a function of inner products: (products x.y, |x|^2, |y|^2, sigma^2) -> its value and its slope in x.y.
Kernel = Callable[[Tensor, Tensor, Tensor, Optional[Tensor]], Tuple[Tensor, Tensor]]


def _poly(degree: int, offset: float) -> Kernel:
    def kernel(products: Tensor, x2: Tensor, y2: Tensor, sigma2: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        base = products + offset
        power = base.pow(degree - 1)
        return power * base, degree * power

    return kernel


def _gaussian(products: Tensor, x2: Tensor, y2: Tensor, sigma2: Tensor) -> Tuple[Tensor, Tensor]:
    value = (x2 + y2 - 2 * products).clamp(min=0).mul(-0.5 / sigma2).exp()
    return value, value / sigma2


class _GramMMD(Function):
    """Any kernel by the three blocks of channels, some rows at a time where whole ones would outgrow the maps."""

    @staticmethod
    def forward(ctx, s: Tensor, t: Tensor, invalid: Optional[Tensor], kernel: Kernel) -> Tensor:
        (s, factor), (t, _) = _prepare(s, invalid), _prepare(t, invalid)
        rs, rt = _inverse_norms(s), _inverse_norms(t)
        sigma2 = _mean_squared_distance(s, t, rs, rt) if kernel is _gaussian else None
        total = s.new_zeros(len(s))
        for rows in _row_blocks(t):
            products = _own_products(rows, t).mul_(rt[:, rows]).mul_(rt.mT)
            total += kernel(products, _alive(rt[:, rows]), _alive(rt.mT), sigma2)[0].sum((1, 2)) / t.shape[1] ** 2
        ctx.kernel = kernel
        row_blocks = list(_row_blocks(s))
        for rows in row_blocks:
            value, *weights = _student_rows(rows, s, t, rs, rt, sigma2, kernel)
            total += value
        ctx.save_for_backward(s, t, factor, rs, rt, sigma2, *(weights if len(row_blocks) == 1 else ()))
        # Rounding may leave a little below 0 of equal maps. The gradient is not clamped.
        return total.clamp(min=0).mean()

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, grad: Tensor):
        s, t, factor, rs, rt, sigma2, *kept = ctx.saved_tensors
        out = torch.empty_like(s)
        grad = grad / len(s)
        for rows in _row_blocks(s):
            of_student, of_teacher = kept or _student_rows(rows, s, t, rs, rt, sigma2, ctx.kernel)[1:]
            # The self-product is symmetric, so its two equal halves are one product.
            out[:, rows].baddbmm_(of_student * grad, s, beta=0)
            out[:, rows].baddbmm_(of_teacher * grad, t)
        return _descale(out, factor), None, None, None


def _row_blocks(x: Tensor) -> Iterator[slice]:
    """All rows at once where their products are small beside the maps."""
    c, positions = x.shape[1:]
    rows = c if c <= positions else max(1, positions // 4)
    return (slice(i, min(i + rows, c)) for i in range(0, c, rows))


def _own_products(rows: slice, x: Tensor) -> Tensor:
    """(N, rows, C): products of some channels with all."""
    return self_product(x) if rows == slice(0, x.shape[1]) else torch.bmm(x[:, rows], x.mT)


def _student_rows(
    rows: slice, s: Tensor, t: Tensor, rs: Tensor, rt: Tensor, sigma2: Optional[Tensor], kernel: Kernel
) -> Tuple[Tensor, Tensor, Tensor]:
    """
    What some of the student's channels add.

    Returns:
        The value (N,), and the weights W (N, rows, Cs) and V (N, rows, Ct) of their gradient ``W S + V T``.
    """
    cs, ct = s.shape[1], t.shape[1]
    r = rs[:, rows]
    own = _own_products(rows, s).mul_(r).mul_(rs.mT)
    cross = torch.bmm(s[:, rows], t.mT).mul_(r).mul_(rt.mT)
    own_value, own_slope = kernel(own, _alive(r), _alive(rs.mT), sigma2)
    cross_value, cross_slope = kernel(cross, _alive(r), _alive(rt.mT), sigma2)
    value = own_value.sum((1, 2)) / cs**2 - cross_value.sum((1, 2)) * (2 / (cs * ct))
    own_slope.mul_(2 / cs**2)
    cross_slope.mul_(-2 / (cs * ct))
    # The part of the gradient along the sample itself is lost in its normalisation.
    along = (own_slope * own).sum(2) + (cross_slope * cross).sum(2)
    own_slope.mul_(r).mul_(rs.mT)
    cross_slope.mul_(r).mul_(rt.mT)
    own_slope[:, :, rows].diagonal(dim1=1, dim2=2).sub_(along * r[:, :, 0].square())
    return value, own_slope, cross_slope


def _mean_squared_distance(s: Tensor, t: Tensor, rs: Tensor, rt: Tensor) -> Tensor:
    """(N, 1, 1): sigma^2, the mean of |t_i - s_j|^2 over all pairs."""
    product = (torch.bmm(rs.mT, s) * torch.bmm(rt.mT, t)).sum(2, keepdim=True) / (s.shape[1] * t.shape[1])
    mean = _alive(rs).mean(1, keepdim=True) + _alive(rt).mean(1, keepdim=True) - 2 * product
    # Where all samples are equal, what is left is rounding: keep it from deciding.
    return mean.clamp(min=16 * torch.finfo(s.dtype).eps)


def _alive(inverse_norms: Tensor) -> Tensor:
    """The squared norm of a sample: 1, or 0 of a dead channel."""
    return (inverse_norms > 0).to(inverse_norms.dtype)


def _descale(out: Tensor, factor: Optional[Tensor]) -> Tensor:
    return out if factor is None else out.mul_(factor)


@DISTILLATION_LOSS_REGISTRY.register()
class NSTLoss(DistillationLoss):
    """:func:`nst_loss` summed over the pairs of taps. The channels of a pair may differ; no connector is needed."""

    name = "nst"

    @configurable
    def __init__(self, *, kernel: str = "poly", degree: int = 2, offset: float = 0.0, **kwargs):
        """
        Args:
            kernel, degree, offset: see :func:`nst_loss`.
            kwargs: see :class:`DistillationLoss`.
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
        return sum(nst_loss(s, t, valid=valid, **self.options) for s, t, valid in self.pairs(student, teacher, context))
