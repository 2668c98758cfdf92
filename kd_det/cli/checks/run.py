"""What the checks know about a run; its folder, its solver and its processes."""

import argparse
import contextlib
import glob
import os
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from torch import nn

from kd_det.data import DatasetSummary
from kd_det.engine.step import NON_FINITE
from kd_det.engine.writers import check_writers
from kd_det.errors import IMPORT_HINT, UserError
from kd_det.weights.average import check_decay

__all__ = ["PlannedRun", "check_folder", "check_processes", "check_solver", "naming", "remove_earlier_run"]

# What a training writes into its folder.
_RUN_FILES = ("last_checkpoint", "metrics.json", "model_*.pth", "log.txt*", "events.out.tfevents.*", "*_run_id")


@dataclass
class PlannedRun:
    """
    Attributes:
        cfg: its config.
        args: its command line.
        model: what it trains or evaluates, on the CPU; set by ``check_model``.
        datasets: a summary of each data set, by name; set by ``check_datasets``.
        warnings: what is odd and no error, for the log.
    """

    cfg: CfgNode
    args: argparse.Namespace
    model: nn.Module | None = None
    datasets: dict[str, DatasetSummary] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        return not self.args.eval_only

    @property
    def training_sets(self) -> list[str]:
        return list(self.cfg.DATASETS.TRAIN) if self.trains else []

    @property
    def test_sets(self) -> list[str]:
        return list(self.cfg.DATASETS.TEST)

    @property
    def num_processes(self) -> int:
        """That ``SOLVER.IMS_PER_BATCH`` is divided among."""
        started = int(os.environ.get("WORLD_SIZE", self.args.num_gpus * self.args.num_machines))
        return self.cfg.SOLVER.REFERENCE_WORLD_SIZE or started

    @property
    def student(self) -> nn.Module:
        return getattr(self.model, "student", self.model)


@contextlib.contextmanager
def naming(what: str, *errors: type[Exception]):
    """Detectron2's builders raise all of these for a name or a number out of range; names what they built."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ZeroDivisionError, *errors) as e:
        hint = f" {IMPORT_HINT}" if "No object named" in str(e) else ""
        raise UserError(f"{what} cannot be built: {type(e).__name__}: {e}{hint}") from e


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


def check_solver(run: PlannedRun) -> None:
    if not run.trains:
        return
    cfg = run.cfg
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: there is nothing to train on")
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if cfg.SOLVER[key] < 1:
            raise UserError(f"SOLVER.{key} must be at least 1, found {cfg.SOLVER[key]}")
    if not 0 < cfg.SOLVER.BASE_LR < float("inf"):
        raise UserError(f"SOLVER.BASE_LR must be a positive number, found {cfg.SOLVER.BASE_LR}")
    if cfg.SOLVER.IMS_PER_BATCH % run.num_processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} (images of all processes together) must be divisible by "
            f"the number of processes, {run.num_processes}"
        )
    if cfg.DATALOADER.NUM_WORKERS < 0:
        raise UserError(f"DATALOADER.NUM_WORKERS must not be negative, found {cfg.DATALOADER.NUM_WORKERS}")
    if cfg.SEED >= 2**31:
        raise UserError(f"SEED must be less than 2^31 (negative: none), found {cfg.SEED}")
    if cfg.get("KD", {}).get("NON_FINITE", "stop") not in NON_FINITE:
        raise UserError(f"KD.NON_FINITE must be one of {', '.join(NON_FINITE)}, found {cfg.KD.NON_FINITE!r}")
    if decay := cfg.get("KD", {}).get("EMA_DECAY", 0.0):
        check_decay(decay, "KD.EMA_DECAY")
    check_writers(cfg.get("KD", {}).get("WRITERS", ()))
    with naming("the solver (SOLVER.*)", ValueError):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        build_lr_scheduler(cfg, optimizer)


def check_processes(run: PlannedRun) -> None:
    gpus = torch.cuda.device_count()
    if run.cfg.MODEL.DEVICE.startswith("cuda") and run.args.num_gpus > gpus:
        raise UserError(f"--num-gpus {run.args.num_gpus}, and this machine has {gpus}")
