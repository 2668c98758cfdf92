"""What a run distils, in one table for the log."""

from tabulate import tabulate
from torch import nn

from kd_det.distiller import Distiller
from kd_det.features.taps import tap_shape
from kd_det.losses.build import DistillationLoss
from kd_det.losses.schedule import Schedule

__all__ = ["distillation_summary"]


def distillation_summary(model: Distiller) -> str:
    """The losses with their weights, schedules and pairs of taps: name, channels and, of a level, its stride."""
    rows = []
    for name, loss in model.losses.items():
        pairs = zip(loss.student_taps, loss.teacher_taps)
        taps = [f"{_place(model.student, s)} <- {_place(model.teacher_of(loss), t)}" for s, t in pairs]
        rows.append((name, _weight(loss), _schedule(loss.schedule), "\n".join(taps) or "regions or logits"))
    return tabulate(rows, headers=("loss", "weight", "schedule", "student <- teacher"), tablefmt="simple")


def _weight(loss: DistillationLoss) -> str:
    return f"{loss.weight:g}" if loss.auto is None else f"auto ({loss.auto.share:g})"


def _place(network: nn.Module, tap: str) -> str:
    try:
        shape = tap_shape(network, tap)
    except ValueError:  # a module that declares no channels
        return tap
    return f"{tap} ({shape.channels} channels{f', stride {shape.stride}' if shape.stride else ''})"


def _schedule(schedule: Schedule) -> str:
    parts = [f"warm-up {schedule.warmup_iters}"] if schedule.warmup_iters else []
    parts += [f"{schedule.decay} decay from {schedule.decay_start}"] if schedule.decay else []
    parts += [f"until {schedule.stop_iter}"] if schedule.stop_iter >= 0 else []
    return ", ".join(parts) or "constant"
