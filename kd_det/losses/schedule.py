"""When a loss acts: its factor at an iteration."""

import math
from dataclasses import dataclass

from kd_det.errors import unknown_name

__all__ = ["Schedule"]

# From the share of a decay that is over to the factor, as DeFeat's code (arXiv 2103.14475) has both.
_DECAYS = {"linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}


@dataclass(frozen=True)
class Schedule:
    """
    Linear warm-up, constant or a decay, off. Where warm-up and decay overlap, their factors are multiplied.

    Attributes:
        warmup_iters: the factor grows linearly from ``1 / warmup_iters`` to 1 in so many iterations.
        stop_iter: the factor is 0 from this iteration on; -1 means never.
        decay: "linear" or "cosine": the factor falls from 1 at ``decay_start`` to 0 at ``stop_iter``; "": it stays.
        decay_start: see ``decay``.
    """

    warmup_iters: int = 0
    stop_iter: int = -1
    decay: str = ""
    decay_start: int = 0

    def __post_init__(self):
        whole = isinstance(self.warmup_iters, int) and isinstance(self.stop_iter, int)
        if not whole or self.warmup_iters < 0 or self.stop_iter < -1:
            raise ValueError(
                f"WARMUP_ITERS must be >= 0 and STOP_ITER >= -1 (never), whole iterations, found {self.warmup_iters} "
                f"and {self.stop_iter}."
            )
        if self.decay not in ("", *_DECAYS):
            raise ValueError(f"{unknown_name('DECAY', self.decay, _DECAYS)} '' is none.")
        if self.decay and not (isinstance(self.decay_start, int) and 0 <= self.decay_start < self.stop_iter):
            raise ValueError(
                f"DECAY_START must be a whole iteration >= 0 before STOP_ITER, where the loss stops, found "
                f"{self.decay_start} and {self.stop_iter}."
            )

    @property
    def is_constant(self) -> bool:
        return not self.warmup_iters and self.stop_iter < 0

    def factor(self, iteration: int) -> float:
        """Between 0 and 1."""
        if 0 <= self.stop_iter <= iteration:
            return 0.0
        factor = min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0
        if self.decay and iteration > self.decay_start:
            factor *= _DECAYS[self.decay]((iteration - self.decay_start) / (self.stop_iter - self.decay_start))
        return factor
