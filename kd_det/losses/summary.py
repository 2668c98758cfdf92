"""What a run distils, in one table for the log."""

from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate
from torch import Tensor

from kd_det.losses.build import DistillationLoss
from kd_det.losses.schedule import Schedule

__all__ = ["distillation_summary"]


def distillation_summary(
    losses: Iterable[DistillationLoss],
    student: Mapping[str, Sequence[Tensor]],
    teachers: Mapping[str, Mapping[str, Sequence[Tensor]]],
) -> str:
    """
    The losses with their weights, schedules and pairs of taps.

    Args:
        losses: of a Distiller.
        student: by tap, the maps of one step, one for each call of the module, whose sizes are shown.
        teachers: the same of each teacher, by its name.
    """
    rows = []
    for loss in losses:
        theirs = teachers.get(loss.teacher_name, {})
        pairs = zip(loss.student_taps, loss.teacher_taps)
        taps = [f"{_place(s, student)} <- {_place(t, theirs)}" for s, t in pairs]
        rows.append((loss.label, _weight(loss), _schedule(loss.schedule), "\n".join(taps) or "regions or logits"))
    return tabulate(rows, headers=("loss", "weight", "schedule", "student <- teacher"), tablefmt="simple")


def _weight(loss: DistillationLoss) -> str:
    return f"{loss.weight:g}" if loss.auto is None else f"auto ({loss.auto.share:g})"


def _place(tap: str, maps: Mapping[str, Sequence[Tensor]]) -> str:
    shape = maps[tap][0].shape[1:] if maps.get(tap) else ()
    return f"{tap} ({shape[0]} channels, {' x '.join(map(str, shape[1:]))})" if len(shape) > 1 else tap


def _schedule(schedule: Schedule) -> str:
    parts = [f"warm-up {schedule.warmup_iters}"] if schedule.warmup_iters else []
    parts += [f"{schedule.decay} decay from {schedule.decay_start}"] if schedule.decay else []
    parts += [f"until {schedule.stop_iter}"] if schedule.stop_iter >= 0 else []
    return ", ".join(parts) or "constant"
