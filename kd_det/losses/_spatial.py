"""What every loss on feature maps needs before its formula: checks, float32, one spatial size, the valid mask."""

import functools
from typing import Callable, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Maps",
    "full_precision",
    "match_maps",
    "pool_to",
    "to_float",
    "unit_rows",
    "within_range",
    "zero_loss",
]


class Maps(NamedTuple):
    """Student and teacher at one spatial size and in one float type; see :func:`match_maps`."""

    student: Tensor
    teacher: Tensor
    valid: Optional[Tensor]
    invalid: Optional[Tensor]
    weights: Optional[Tensor] = None  # (N, 1, H, W), 0 at invalid positions; of each image, the others' mean is 1

    @property
    def empty(self) -> bool:
        return self.student.numel() == 0 or self.teacher.numel() == 0

    def positions(self) -> Tensor:
        """(N,): how many valid positions each image has, at least 1 so that it can divide."""
        n, _, h, w = self.student.shape
        if self.valid is None:
            return self.student.new_full((n,), h * w)
        return self.valid.sum((1, 2, 3), dtype=self.student.dtype).clamp_(min=1)


def full_precision(function):
    """
    Runs ``function`` with autocast off on the device of its first tensor, which may be inside a list of levels. Casting
    is left to :func:`to_float`.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        device = next((x.device.type for x in _tensors((*args, *kwargs.values()))), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def _tensors(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def to_float(name: str, student: Tensor, teacher: Tensor) -> Tuple[Tensor, Tensor]:
    """
    Both in float32 (float64 where one of them is), the teacher without its graph.

    Raises:
        ValueError: no tensor, not floating point, or on different devices.
    """
    for side, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: the {side} must be a floating-point tensor, found {found}.")
    if student.device != teacher.device:
        raise ValueError(
            f"{name}: student and teacher must be on one device, found {student.device} and {teacher.device}."
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def match_maps(
    name: str,
    student: Tensor,
    teacher: Tensor,
    valid: Optional[Tensor] = None,
    same_channels: bool = False,
    weights: Optional[Tensor] = None,
) -> Maps:
    """
    Checks two feature maps, and converts them to one float type and, by :func:`pool_to`, to one spatial size.

    Args:
        name: the loss, for the messages.
        student: (N, Cs, Hs, Ws).
        teacher: (N, Ct, Ht, Wt); is detached.
        valid: None or bool (N, 1, H, W) at the size of either map. At the working size, a position is valid if any
            valid position falls on it.
        same_channels: whether Cs must equal Ct.
        weights: None or float (N, 1, H, W) at the size of either map, not negative: how much each position counts
            beside the others of its image. They are scaled to a mean of 1 over the image's valid positions, so that
            equal weights change nothing, and an image with weights of 0 only does not count at all.

    Raises:
        ValueError: shapes, types or devices that do not fit together; names what was found and expected.
    """
    student, teacher = to_float(name, student, teacher)
    for side, x in (("student", student), ("teacher", teacher)):
        if x.dim() != 4:
            raise ValueError(f"{name}: the {side}'s features must be (N, C, H, W), found shape {tuple(x.shape)}.")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{name}: student and teacher must hold the same images, found batches of {student.shape[0]} and "
            f"{teacher.shape[0]}."
        )
    if same_channels and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{name}: needs as many student as teacher channels, found {student.shape[1]} and {teacher.shape[1]}; "
            f"put a connector on the student."
        )
    sizes = (tuple(student.shape[2:]), tuple(teacher.shape[2:]))
    expected = [(student.shape[0], 1, *size) for size in dict.fromkeys(sizes)]
    for what, x, fits in (
        ("valid must be a bool mask", valid, lambda x: x.dtype == torch.bool),
        ("weights must be a float map", weights, Tensor.is_floating_point),
    ):
        if x is not None and not (isinstance(x, Tensor) and fits(x) and tuple(x.shape) in expected):
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: {what} of shape {' or '.join(map(str, expected))}, found {found}.")
    valid = valid if valid is None else valid.to(student.device)
    if student.numel() == 0 or teacher.numel() == 0:
        return Maps(student, teacher, valid, None)
    size = tuple(map(min, *sizes))
    student, teacher = pool_to(student, size, valid), pool_to(teacher, size, valid)
    if weights is not None:
        weights = pool_to(weights.detach().to(student), size, valid)
    if valid is not None:
        valid = _resize(valid, size)
    maps = Maps(student, teacher, valid, None if valid is None else ~valid)
    return maps if weights is None else Maps(*maps[:4], _with_mean_1(weights, maps))


def _with_mean_1(weights: Tensor, maps: Maps) -> Tensor:
    if maps.invalid is not None:
        weights = weights.masked_fill(maps.invalid, 0)
    mean = weights.sum((2, 3), keepdim=True) / maps.positions()[:, None, None, None]
    return weights / mean.masked_fill_(mean == 0, torch.inf)


def pool_to(x: Tensor, size: Tuple[int, int], valid: Optional[Tensor] = None) -> Tensor:
    """Adaptive average pooling of (N, C, H, W) to ``size``, over the valid positions only."""
    if tuple(x.shape[2:]) == size:
        return x
    if valid is None:
        return F.adaptive_avg_pool2d(x, size)
    valid = _resize(valid, tuple(x.shape[2:]))
    # Both averages have the same number of positions below, so their quotient is the average over the valid ones.
    share = F.adaptive_avg_pool2d(valid.to(x.dtype), size)
    pooled = F.adaptive_avg_pool2d(x.masked_fill(~valid, 0), size)
    return pooled / share.masked_fill(share == 0, 1)


def _resize(valid: Tensor, size: Tuple[int, int]) -> Tensor:
    if tuple(valid.shape[2:]) == size:
        return valid
    return F.adaptive_max_pool2d(valid.float(), size) > 0


def unit_rows(x: Tensor) -> Tensor:
    """
    (..., D) with each row divided by its L2 norm. A zero row stays zero and has zero gradient, rows far from 1 do not
    under- or overflow.
    """
    # The quotient does not depend on the scale of a row, so the peak needs no gradient.
    largest = peak(x, -1)
    x = x / largest.masked_fill_(largest <= torch.finfo(x.dtype).tiny, torch.inf)
    # A live row now has a norm of at least 1.
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=0.5)


def peak(x: Tensor, dims) -> Tensor:
    """The largest magnitude over ``dims``, which are kept; no gradient, at least the type's least normal number."""
    x = x.detach()
    # On a CPU the norm takes five times as long as the two reductions that are two kernels elsewhere.
    largest = (
        torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))
        if x.device.type == "cpu"
        else torch.linalg.vector_norm(x, torch.inf, dims, keepdim=True)
    )
    return largest.clamp_(min=torch.finfo(x.dtype).tiny)


def within_range(function: Callable, magnitudes: Callable, dims, *maps: Tensor) -> Tuple:
    """
    Keeps powers and products of maps in the range of their type, for losses that do not depend on the maps' scales.

    On a CPU, checking the result is cheap and dividing a whole map is not. On an accelerator the check would make the
    host wait for the device, so the maps are always divided.

    Args:
        function: computes the powers or products.
        magnitudes: from what ``function`` returns to the numbers that must neither over- nor underflow.
        dims: what a scale is common to, such as the positions of a channel.
        maps: the maps, each with scales of its own.

    Returns:
        ``function(*maps)`` and None, or that of the maps divided by their :func:`peak`, and the first map's peak.
    """
    if maps[0].device.type == "cpu":
        out = function(*maps)
        found = magnitudes(out).detach()
        if ((found > 1e-15) & (found < 1e15)).all():
            return out, None
    peaks = [peak(x, dims) for x in maps]
    return function(*(x / largest for x, largest in zip(maps, peaks))), peaks[0]


def zero_loss(student: Tensor) -> Tensor:
    """The loss of an empty batch: 0 with a path to the student."""
    return student[:0].sum()
