"""An exponential moving average of a model's weights."""

import contextlib
from typing import Dict

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

__all__ = ["AverageWeights", "WeightAverage"]


class WeightAverage:
    """
    The average of a model's floating-point parameters and buffers (batch-norm statistics too): after update n,
    ``a <- d a + (1 - d) w`` with ``d = min(decay, (1 + n) / (10 + n))``, so that a short run does not average its
    random start. Its state is a checkpointable.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: of a Distiller, what its ``state_dict`` holds is averaged: the student.
            decay: in (0, 1).

        Raises:
            ValueError: another decay.
        """
        if not 0 < decay < 1:
            raise ValueError(f"CLASSIFICATION.EMA_DECAY must be in (0, 1), or 0 for no average, found {decay}.")
        self.decay = decay
        self.updates = 0
        self._model = model
        self._averages = {key: value.clone() for key, value in self._weights().items()}

    def _weights(self) -> Dict[str, Tensor]:
        return {key: value for key, value in self._model.state_dict().items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, value in self._weights().items():
            self._averages[key].lerp_(value, 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """Inside, the model's weights are the averages."""
        weights = self._weights()
        kept = {key: value.clone() for key, value in weights.items()}
        self._copy(self._averages, weights)
        try:
            yield
        finally:
            self._copy(kept, weights)

    @staticmethod
    @torch.no_grad()
    def _copy(source: Dict[str, Tensor], target: Dict[str, Tensor]) -> None:
        for key, value in target.items():
            value.copy_(source[key])

    def state_dict(self) -> Dict:
        return {"updates": self.updates, "averages": self._averages}

    def load_state_dict(self, state: Dict) -> None:
        self.updates = state["updates"]
        self._copy(state["averages"], self._averages)


class AverageWeights(HookBase):
    """Updates a :class:`WeightAverage` after every step."""

    def __init__(self, average: WeightAverage):
        self._average = average

    def after_step(self):
        self._average.update()
