"""When a loss acts: its factor at an iteration."""

from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """
    Linear warm-up, constant, off.

    Attributes:
        warmup_iters: the factor grows linearly from ``1 / warmup_iters`` to 1 in so many iterations.
        stop_iter: the factor is 0 from this iteration on; -1 means never.
    """

    warmup_iters: int = 0
    stop_iter: int = -1

    def __post_init__(self):
        whole = isinstance(self.warmup_iters, int) and isinstance(self.stop_iter, int)
        if not whole or self.warmup_iters < 0 or self.stop_iter < -1:
            raise ValueError(
                f"warm-up must be >= 0 and stop >= -1 (never) whole iterations, found {self.warmup_iters} and "
                f"{self.stop_iter}."
            )

    @property
    def is_constant(self) -> bool:
        return not self.warmup_iters and self.stop_iter < 0

    def factor(self, iteration: int) -> float:
        """Between 0 and 1."""
        if 0 <= self.stop_iter <= iteration:
            return 0.0
        return min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0
