"""The folder that a run writes to."""

import argparse
import glob
import os

from detectron2.utils import comm

from kd_det.cli.checks.planned_run import PlannedRun
from kd_det.errors import UserError

__all__ = ["check_folder", "check_output_dir", "remove_earlier_run"]

# What a training writes into its folder.
_RUN_FILES = ("last_checkpoint", "metrics.json", "model_*.pth", "log.txt*", "events.out.tfevents.*")


def check_output_dir(run: PlannedRun) -> None:
    check_folder(run.cfg.OUTPUT_DIR, run.args)


def check_folder(path: str, args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: a run with this command line cannot write to the folder, or would mix with the run that it holds.
    """
    if not path:
        raise UserError("OUTPUT_DIR is empty; expected a folder for checkpoints and logs")
    if "://" in path:
        return
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise UserError(f"OUTPUT_DIR {path!r}: {existing!r} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"OUTPUT_DIR {path!r}: no permission to write to {existing!r}")
    allowed = args.eval_only or args.resume or args.overwrite
    if not allowed and os.path.isfile(os.path.join(path, "last_checkpoint")):
        raise UserError(
            f"OUTPUT_DIR {path!r} holds the checkpoints of a run: continue it with --resume, replace it with "
            f"--overwrite, or choose another OUTPUT_DIR"
        )


def remove_earlier_run(path: str, args: argparse.Namespace) -> None:
    """
    With ``--overwrite``, remove the files that a training wrote into its folder, and no others. Every rank of the new
    run calls it, once the folder is locked.
    """
    if not args.overwrite or args.resume or args.eval_only:
        return
    if comm.is_main_process():
        for pattern in _RUN_FILES:
            for file in glob.glob(os.path.join(glob.escape(path), pattern)):
                os.remove(file)
    comm.synchronize()
