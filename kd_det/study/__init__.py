"""Many runs, one table."""

from kd_det.study.runs import Run, read_metrics, run_command

__all__ = ["Run", "read_metrics", "run_command"]
