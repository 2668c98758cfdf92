"""The solver's numbers and the processes that train."""

import torch
from detectron2.solver import build_lr_scheduler
from torch import nn

from kd_det.cli.checks.building import naming
from kd_det.cli.checks.planned_run import PlannedRun
from kd_det.engine.step import NON_FINITE
from kd_det.errors import UserError

__all__ = ["check_processes", "check_solver"]


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
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or run.num_processes
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} (images of all processes together) must be divisible by "
            f"the number of processes, {reference}"
        )
    if cfg.DATALOADER.NUM_WORKERS < 0:
        raise UserError(f"DATALOADER.NUM_WORKERS must not be negative, found {cfg.DATALOADER.NUM_WORKERS}")
    if cfg.SEED >= 2**31:
        raise UserError(f"SEED must be less than 2^31 (negative: none), found {cfg.SEED}")
    if cfg.get("KD", {}).get("NON_FINITE", "stop") not in NON_FINITE:
        raise UserError(f"KD.NON_FINITE must be one of {', '.join(NON_FINITE)}, found {cfg.KD.NON_FINITE!r}")
    with naming("the solver (SOLVER.*)", ValueError):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        build_lr_scheduler(cfg, optimizer)


def check_processes(run: PlannedRun) -> None:
    gpus = torch.cuda.device_count()
    if run.cfg.MODEL.DEVICE.startswith("cuda") and run.args.num_gpus > gpus:
        raise UserError(f"--num-gpus {run.args.num_gpus}, and this machine has {gpus}")
