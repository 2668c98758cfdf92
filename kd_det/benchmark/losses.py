"""Each loss on feature maps beside its floor: the arithmetic that no implementation can avoid."""

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from kd_det.benchmark.measure import kernels, peak_bytes, seconds
from kd_det.losses.attention_transfer import attention_transfer_loss
from kd_det.losses.cwd import cwd_loss
from kd_det.losses.hint import hint_loss
from kd_det.losses.nst import nst_loss
from kd_det.losses.overhaul import overhaul_loss
from kd_det.losses.pkd import pkd_loss
from kd_det.losses.similarity import similarity_preserving_loss

__all__ = ["METHODS", "measure_loss"]


def gram(s: Tensor, t: Tensor) -> Tensor:
    """The three blocks of channels; backward, one product each for the student's own block and the mixed one."""
    s, t = s.flatten(2), t.flatten(2)
    own, cross, _ = torch.bmm(s, s.mT), torch.bmm(s, t.mT), torch.bmm(t, t.mT)
    return torch.bmm(own, s).baddbmm_(cross, t)


def elementwise(s: Tensor, t: Tensor) -> Tensor:
    """Forward, one read of both maps; backward, one read of both and one write of the gradient."""
    s.sum(), t.sum()
    return s + t


def row_products(s: Tensor, t: Tensor) -> Tensor:
    """The Gram of either side; backward, one product."""
    s, t = s.flatten(1), t.flatten(1)
    own, _ = s @ s.T, t @ t.T
    return own @ s


def _overhaul(s: Tensor, t: Tensor) -> Tensor:
    return overhaul_loss(s, t, torch.full((t.shape[1],), -0.5, device=t.device))


# (student, teacher) -> scalar, and its floor: (student, teacher) -> as much memory as the gradient's, written.
METHODS: dict[str, tuple[Callable, Callable]] = {
    "nst": (nst_loss, gram),
    "at": (attention_transfer_loss, elementwise),
    "overhaul": (_overhaul, elementwise),
    "hint": (hint_loss, elementwise),
    "similarity": (similarity_preserving_loss, row_products),
    "nst_linear": (functools.partial(nst_loss, kernel="linear"), gram),
    "nst_gaussian": (functools.partial(nst_loss, kernel="gaussian"), gram),
    "at_sum": (functools.partial(attention_transfer_loss, mapping="sum"), elementwise),
    "at_max": (functools.partial(attention_transfer_loss, mapping="max_pow"), elementwise),
    "pkd": (pkd_loss, elementwise),
    "cwd": (cwd_loss, elementwise),
}


def measure_loss(name: str, shape: list[int], *, device: str, repeat: int) -> dict:
    """
    Forward and backward of a loss on random maps, and its floor, in turns: the best times, since other work on the
    machine only adds time, and the median of the ratios of pairs. Extra maps are memory on top of both maps, the
    gradient included, in sizes of the student's map.
    """
    loss, floor = METHODS[name]
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    student.requires_grad_()

    def step() -> Tensor:
        return torch.autograd.grad(loss(student, teacher), student)[0]

    runs = (step, functools.partial(floor, student.detach(), teacher))
    # As many calls as fill 20 ms; the second call is the measure, for the first one warms up.
    calls = [max(1, min(200, int(0.02 / max(1e-6, [seconds(run) for _ in range(2)][1])))) for run in runs]
    pairs = [[seconds(run, n) for run, n in zip(runs, calls)] for _ in range(repeat)]
    best, best_floor = (min(column) for column in zip(*pairs))
    return {
        "loss": name,
        "shape": "x".join(map(str, shape)),
        "ms": 1e3 * best,
        "floor ms": 1e3 * best_floor,
        "ratio": best / best_floor,
        "median ratio": statistics.median(taken / least for taken, least in pairs),
        "extra maps": peak_bytes(step, device) / (student.numel() * student.element_size()),
        "kernels": kernels(step) if student.is_cuda else None,
    }
