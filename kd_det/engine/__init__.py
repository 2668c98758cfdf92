"""Detectron2's training engine for distillation: the trainer, the command line, and what is checked before a run."""

from kd_det.engine.arguments import add_teacher, argument_parser, load_config, parse_arguments, plain_student_cfg
from kd_det.engine.checks import check_run
from kd_det.engine.cli import run_tool
from kd_det.engine.launch import launch
from kd_det.engine.loader import ResumableLoader, build_train_loader
from kd_det.engine.runs import Run, read_metrics, run_command
from kd_det.engine.stopping import RESUMABLE
from kd_det.engine.trainer import Trainer, evaluate

__all__ = [
    "RESUMABLE",
    "ResumableLoader",
    "Run",
    "Trainer",
    "add_teacher",
    "argument_parser",
    "build_train_loader",
    "check_run",
    "evaluate",
    "launch",
    "load_config",
    "parse_arguments",
    "plain_student_cfg",
    "read_metrics",
    "run_command",
    "run_tool",
]
