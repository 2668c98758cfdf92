"""What distillation costs: each loss beside the floor of its arithmetic, and a training step with and without."""

from kd_det.benchmark.command import main

__all__ = ["main"]
