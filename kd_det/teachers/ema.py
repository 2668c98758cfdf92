"""The student's own average as its teacher (mean teacher, arXiv 1703.01780)."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from kd_det.teachers.runner import Teacher
from kd_det.weights.average import average_statistics, check_decay, floating_weights, update_average

__all__ = ["EMATeacher", "ema_teacher"]


def ema_teacher(model: nn.Module, decay: float = 0.999) -> nn.Module:
    """
    A network built as the student is, as ``Distiller(teacher=...)`` wants it: its weights become the average of the
    student's, see :class:`EMATeacher`. A ``ValueError`` for a decay outside (0, 1).
    """
    check_decay(decay, "KD.TEACHER.EMA_DECAY")
    model.ema_decay = decay
    return model.eval().requires_grad_(False)


class EMATeacher(Teacher):
    """
    A teacher whose weights and batch-norm statistics are the exponential moving average of the student's. It begins as
    the student of the first training batch, and takes in the student before each that follows: with any trainer, and
    with accumulated gradients once for each batch, not for each step. Batch-norm statistics are averaged over ranks.
    """

    def __init__(self, model: nn.Module, taps: Sequence[str], *, student: nn.Module, dtype: torch.dtype, **options):
        """For arguments see :class:`Teacher`; a ``ValueError`` for another network than the student's."""
        shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (model, student)]
        if shapes[0] != shapes[1]:
            raise ValueError("The student's own average needs a network built as the student is, found another one.")
        if dtype != torch.float32:
            raise ValueError("KD.TEACHER.DTYPE: an average of the student's weights is kept in float32.")
        super().__init__(model, taps, student=student, dtype=dtype, **options)
        self.fingerprint = "the student's average"  # its weights change
        self.updates = 0

    def __deepcopy__(self, memo):
        ret = memo[id(self)] = object.__new__(type(self))  # a copy of the student has an average of its own
        ret.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return ret

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        weights = floating_weights(student)
        device = next(iter(weights.values())).device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        averages = floating_weights(self.model)
        ordered = [weights[key] for key in averages]
        if self.updates:
            update_average(averages.values(), ordered, self.model.ema_decay, self.updates)
        else:
            torch._foreach_copy_(list(averages.values()), ordered)
        self.updates += 1
        average_statistics(self.model)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "averages": floating_weights(self.model)}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.updates = state.get("updates", 0)
        for key, value in floating_weights(self.model).items():
            if self.updates:
                value.copy_(state["averages"][key])
