"""What is wrong with a run, found before anything is written and before any image is trained on."""

import argparse
import os

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from kd_det.checkpoint import find_weights
from kd_det.classification import check_classes
from kd_det.data import check_dataset
from kd_det.engine.arguments import plain_student_cfg
from kd_det.engine.cli import UserError
from kd_det.engine.trainer import EVALUATORS
from kd_det.errors import unknown_name
from kd_det.random_state import preserved_random_state

__all__ = ["check_run"]


def check_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Check everything that can be known before training: solver values, the output folder, the networks with their
    taps, losses and teacher's weights (they are built once on the CPU), the initial weights, the data sets.

    Under torchrun, only the first process of each machine checks.

    Args:
        cfg: the config of the run.
        args: its command line, see :func:`kd_det.engine.argument_parser`.

    Raises:
        ValueError, OSError: with one line for the user.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    _check_output_dir(cfg.OUTPUT_DIR)
    if args.eval_only:
        _check_evaluation(cfg, args.resume)
    else:
        _check_solver(cfg, int(os.environ.get("WORLD_SIZE", args.num_gpus * args.num_machines)))
    gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE.startswith("cuda") and args.num_gpus > gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, and this machine has {gpus}")
    _check_model(cfg)
    if cfg.MODEL.WEIGHTS:
        find_weights(cfg.MODEL.WEIGHTS, who="student (MODEL.WEIGHTS)")
    training_sets = [] if args.eval_only else list(cfg.DATASETS.TRAIN)
    if plain_student_cfg(cfg).MODEL.META_ARCHITECTURE.endswith("Classifier"):
        check_classes(cfg, training_sets + list(cfg.DATASETS.TEST))
        return
    for name in dict.fromkeys(training_sets + list(cfg.DATASETS.TEST)):
        summary = check_dataset(name)
        _check_classes(cfg, name, summary.thing_classes)
        if name in training_sets and not summary.num_instances:
            raise UserError(f"data set '{name}' has {summary.num_images} images and no annotation to train on")
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind not in EVALUATORS:
            raise UserError(f"data set '{name}': {unknown_name('evaluator_type', kind, EVALUATORS)}")


def _check_evaluation(cfg: CfgNode, resume: bool) -> None:
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: there is nothing to evaluate on")
    if not cfg.MODEL.WEIGHTS and not (resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))):
        raise UserError("MODEL.WEIGHTS is empty: there is nothing to evaluate")


def _check_output_dir(path: str) -> None:
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


def _check_solver(cfg: CfgNode, num_processes: int) -> None:
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: there is nothing to train on")
    for key, least in (("MAX_ITER", 1), ("IMS_PER_BATCH", 1), ("CHECKPOINT_PERIOD", 1)):
        if cfg.SOLVER[key] < least:
            raise UserError(f"SOLVER.{key} must be at least {least}, found {cfg.SOLVER[key]}")
    if not 0 < cfg.SOLVER.BASE_LR < float("inf"):
        raise UserError(f"SOLVER.BASE_LR must be a positive number, found {cfg.SOLVER.BASE_LR}")
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_processes
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} (images of all processes together) must be divisible by "
            f"the number of processes, {reference}"
        )
    if cfg.DATALOADER.NUM_WORKERS < 0:
        raise UserError(f"DATALOADER.NUM_WORKERS must not be negative, found {cfg.DATALOADER.NUM_WORKERS}")


def _check_model(cfg: CfgNode) -> None:
    registered = [name for name, _ in META_ARCH_REGISTRY]
    if cfg.MODEL.META_ARCHITECTURE not in registered:
        raise UserError(unknown_name("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, registered))
    on_cpu = cfg.clone()
    on_cpu.defrost()
    on_cpu.MODEL.DEVICE = "cpu"
    with preserved_random_state():
        try:
            build_model(on_cpu)
        except (KeyError, AssertionError, AttributeError, TypeError, RuntimeError, IndexError) as e:
            # Detectron2's builders raise all of these for a name or a number in the config that cannot be.
            raise UserError(f"the model of this config cannot be built: {type(e).__name__}: {e}") from e


def _check_classes(cfg: CfgNode, name: str, classes) -> None:
    architecture = plain_student_cfg(cfg).MODEL.META_ARCHITECTURE
    node = {"GeneralizedRCNN": "ROI_HEADS", "RetinaNet": "RETINANET"}.get(architecture)
    if node and classes and len(classes) > cfg.MODEL[node].NUM_CLASSES:
        raise UserError(
            f"data set '{name}' has {len(classes)} classes and MODEL.{node}.NUM_CLASSES is "
            f"{cfg.MODEL[node].NUM_CLASSES}"
        )
