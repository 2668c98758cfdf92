"""The command line: arguments, what is checked before a run, and how processes start and end."""

from kd_det.cli.arguments import argument_parser, load_config, parse_arguments
from kd_det.cli.checks import check_run
from kd_det.cli.launch import launch
from kd_det.cli.run_tool import run_tool
from kd_det.cli.teacher import add_teacher

__all__ = ["add_teacher", "argument_parser", "check_run", "launch", "load_config", "parse_arguments", "run_tool"]
