"""
Train a detector with or without a teacher, or evaluate it: Detectron2's tools/train_net.py for configs with KD keys.

    kd-det train --config-file configs/Quickstart/student.yaml
    kd-det train --config-file any_student.yaml --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml
    kd-det train --config-file mine.yaml --import my_data.py --num-gpus 8
    kd-det train --config-file mine.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import functools
import math
import os
import shlex
import sys

from detectron2.config import CfgNode
from detectron2.engine import default_setup, hooks
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from kd_det.classification.trainer import BACKBONE_FILE, check_trainer, is_classifier
from kd_det.cli.arguments import argument_parser, load_config, parse_arguments
from kd_det.cli.checks import check_run
from kd_det.cli.checks.run import remove_earlier_run
from kd_det.cli.launch import launch
from kd_det.cli.run_tool import run_tool
from kd_det.cli.visualize import visualization_hook
from kd_det.engine import Trainer, evaluate
from kd_det.engine.average import AVERAGE_FILE
from kd_det.engine.best import BEST_FILE
from kd_det.engine.evaluation import test_with_augmentation
from kd_det.study.run_config import used_config


def train_or_evaluate(args: argparse.Namespace, trainer_class: type[Trainer]):
    """What every process of a run does: train, or with ``--eval-only`` evaluate; returns the results."""
    if comm.get_world_size() > 1:  # under torchrun, only the first process has checked and completed the options
        args.opts, args.warnings = comm.all_gather((args.opts, args.warnings))[0]
    cfg = load_config(args)
    remove_earlier_run(cfg.OUTPUT_DIR, args)
    default_setup(used_config(cfg), args)
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_det")
    logger.info(f"Command: {getattr(args, 'command', f'{sys.argv[0]} {shlex.join(sys.argv[1:])}')}")
    for warning in args.warnings:
        logger.warning(warning)
    if args.eval_only:
        results = evaluate(cfg, trainer_class, resume=args.resume)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    model = getattr(trainer.model, "module", trainer.model)
    if cfg.VIS_PERIOD > 0 and not is_classifier(cfg) and comm.is_main_process():  # the one that writes
        trainer.register_hooks([visualization_hook(cfg, model)])
    if cfg.TEST.AUG.ENABLED:
        student = getattr(model, "student", model)

        def evaluate_with_augmentation():
            with trainer.averaged():
                return test_with_augmentation(cfg, student, trainer_class)

        trainer.register_hooks([hooks.EvalHook(0, evaluate_with_augmentation)])
    results = trainer.train()
    logger.info(closing_words(cfg, results or {}))
    return results


def closing_words(cfg: CfgNode, results: dict) -> str:
    """What a training has written, and what to do with it."""
    folder, files = cfg.OUTPUT_DIR, ("model_final.pth", AVERAGE_FILE, BEST_FILE, BACKBONE_FILE)
    files = [name for name in files if os.path.isfile(os.path.join(folder, name))]
    metric, value = next(iter(flatten_results_dict(results).items()), ("", math.nan))
    score = f" ({metric} {value:.2f})" if metric else ""
    if is_classifier(cfg):
        following = f"kd-det train --config-file DETECTOR.yaml MODEL.WEIGHTS {folder}/{BACKBONE_FILE}"
    else:
        weights = AVERAGE_FILE if AVERAGE_FILE in files else "model_final.pth"  # what was evaluated
        following = f"kd-det export --config-file {folder}/config.yaml --weights {folder}/{weights} --output exported"
    return f"Wrote {', '.join(files)} to {folder}{score}. Next:\n  {following}\n  kd-det report {folder}"


def check_and_launch(args: argparse.Namespace, trainer_class: type[Trainer]) -> None:
    """Check a run, and call :func:`train_or_evaluate` in every process of it."""
    cfg = load_config(args)
    check_trainer(cfg, trainer_class)
    cfg = check_run(cfg, args)
    process = functools.partial(train_or_evaluate, trainer_class=trainer_class)
    launch(process, args, output_dir=cfg.OUTPUT_DIR, device=cfg.MODEL.DEVICE)


def get_parser() -> argparse.ArgumentParser:
    return argument_parser(__doc__)


def main(argv: list[str] | None = None) -> None:
    run_tool(check_and_launch, parse_arguments(get_parser(), argv), Trainer)
