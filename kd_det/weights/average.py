"""An exponential moving average of a model's weights, and batch-norm statistics that are the same on all processes."""

import contextlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["WeightAverage", "average_statistics", "check_decay", "floating_weights", "update_average"]


def check_decay(decay: float, key: str) -> None:
    """A ``ValueError`` that names the config's key where a decay is not in (0, 1)."""
    if not 0 < decay < 1:
        raise ValueError(f"{key} must be in (0, 1), or 0 for no average, found {decay}.")


def floating_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers (batch-norm statistics too) without whole numbers."""
    return {key: value for key, value in model.state_dict().items() if value.is_floating_point()}


@torch.no_grad()
def update_average(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, n: int) -> None:
    """
    The n-th update, in place: ``a <- d a + (1 - d) w`` with ``d = min(decay, (1 + n) / (10 + n))``, so that a short run
    does not average its random start.
    """
    get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(list(averages), list(weights), n)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """
    Replace the running statistics of batch norms that normalise each process' images separately by their mean over all
    processes, which all must call this.
    """
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if buffers and comm.get_world_size() > 1:
        means = torch.cat(buffers)
        dist.all_reduce(means)
        means /= comm.get_world_size()
        torch._foreach_copy_(buffers, means.split([len(buffer) for buffer in buffers]))


class WeightAverage:
    """
    The average of a model's floating-point weights, see :func:`update_average`. Its state is a checkpointable.

    torch's ``AveragedModel`` has the same arithmetic, but deep-copies the model, with all hooks on it, and waits for
    the device at every update to read its counter.
    """

    def __init__(self, model: nn.Module, decay: float):
        check_decay(decay, "KD.EMA_DECAY")
        self.decay = decay
        self.updates = 0
        self._model = model
        self._averages = {key: value.clone() for key, value in floating_weights(model).items()}

    @torch.no_grad()
    def start(self) -> None:
        """Begin at the weights that the model now has, for example loaded ones, unless there was an update."""
        if not self.updates:
            torch._foreach_copy_(list(self._averages.values()), list(floating_weights(self._model).values()))

    def update(self) -> None:
        self.updates += 1
        weights = floating_weights(self._model).values()
        update_average(self._averages.values(), weights, self.decay, self.updates)

    @contextlib.contextmanager
    def applied(self):
        """A context in which the model's weights are the averages."""
        weights = list(floating_weights(self._model).values())
        kept = [value.clone() for value in weights]
        torch._foreach_copy_(weights, list(self._averages.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "averages": self._averages}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for key, value in self._averages.items():
            value.copy_(state["averages"][key])
