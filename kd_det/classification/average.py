"""An exponential moving average of a model's weights, and of batch-norm statistics over the processes."""

import contextlib

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["AverageStatistics", "WeightAverage"]


class WeightAverage:
    """
    The average of a model's floating-point parameters and buffers (batch-norm statistics too): after update n,
    ``a <- d a + (1 - d) w`` with ``d = min(decay, (1 + n) / (10 + n))``, so that a short run does not average its
    random start. Its state is a checkpointable.

    torch's ``AveragedModel`` has the same arithmetic, but deep-copies the model, with all hooks on it, and waits for
    the device at every update to read its counter.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"CLASSIFICATION.EMA_DECAY must be in (0, 1), or 0 for no average, found {decay}.")
        self.decay = decay
        self.updates = 0
        self._model = model
        self._averages = {key: value.clone() for key, value in self._weights().items()}

    def _weights(self) -> dict[str, Tensor]:
        return {key: value for key, value in self._model.state_dict().items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        average = get_ema_multi_avg_fn(min(self.decay, (1 + self.updates) / (10 + self.updates)))
        average(list(self._averages.values()), list(self._weights().values()), self.updates)

    @contextlib.contextmanager
    def applied(self):
        """A context in which the model's weights are the averages."""
        weights = list(self._weights().values())
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


class AverageStatistics(HookBase):
    """
    After every step, replaces the running statistics of batch norms that normalise each process' images separately by
    their mean over all processes (running averages are linear, so nothing else changes). The model that all processes
    evaluate is then the one that the first process saves.
    """

    @torch.no_grad()
    def after_step(self):
        buffers = [
            buffer
            for module in self.trainer.model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        if buffers and comm.get_world_size() > 1:
            means = torch.cat(buffers)
            dist.all_reduce(means)
            means /= comm.get_world_size()
            torch._foreach_copy_(buffers, means.split([len(buffer) for buffer in buffers]))
