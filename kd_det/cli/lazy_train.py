"""
Train or evaluate from a LazyConfig file: Detectron2's tools/lazyconfig_train_net.py for models that may be a Distiller.

    kd-det lazy-train --config-file configs/lazy/fcos_R_50_from_R_101_nst_1x.py
    kd-det lazy-train --config-file any_student.py --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml --losses NST
    kd-det lazy-train --config-file mine.py --eval-only train.init_checkpoint=output/model_final.pth
"""

import argparse
import logging
import os
import shlex
import sys

import torch
from detectron2.config import instantiate
from detectron2.engine import default_setup, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, ListConfig

from kd_det.cli.arguments import argument_parser, parse_arguments
from kd_det.cli.checks.run import check_folder, remove_earlier_run
from kd_det.cli.launch import launch
from kd_det.cli.lazy_config import load_lazy_config, plain_student
from kd_det.cli.run_tool import run_tool
from kd_det.engine.step import TrainStep
from kd_det.errors import UserError
from kd_det.weights.checkpoint import SafeCheckpointer
from kd_det.weights.strict import load_strictly

__all__ = ["evaluate_lazy"]


def evaluate_lazy(cfg: DictConfig, model):
    """Evaluate a model by a LazyConfig's test loader and evaluators, and return the results; None without them."""
    if "evaluator" not in cfg.dataloader:
        return None
    evaluator = cfg.dataloader.evaluator
    evaluator = [instantiate(e) for e in evaluator] if isinstance(evaluator, ListConfig) else instantiate(evaluator)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    print_csv_format(results)
    return results


def _train(cfg: DictConfig, *, config_file: str, resume: bool):
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    if comm.get_world_size() > 1:
        on_cpu = {} if next(model.parameters()).is_cuda else {"device_ids": None}
        model = create_ddp_model(model, **cfg.train.ddp, **on_cpu)
    trainer = TrainStep(
        model,
        instantiate(cfg.dataloader.train),
        optimizer,
        precision=torch.float16 if cfg.train.amp.enabled else None,
        dump_dir=os.path.join(cfg.train.output_dir, "non_finite"),
    )
    checkpointer = SafeCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    trainer.register_hooks(
        [hooks.IterationTimer(), hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))]
        + [hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)] * comm.is_main_process()
        + [hooks.EvalHook(cfg.train.eval_period, lambda: evaluate_lazy(cfg, model))]
    )
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=cfg.train.log_period)])
    resumes = resume and checkpointer.has_checkpoint()
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    trainer.train(trainer.iter + 1 if resumes else 0, cfg.train.max_iter)
    weights = os.path.join(cfg.train.output_dir, "model_final.pth")
    export = f"kd-det export --config-file {config_file} --weights {weights} --output exported"
    report = f"kd-det report {cfg.train.output_dir}"
    logging.getLogger("kd_det").info(f"Wrote {weights}. Next:\n  {export}\n  {report}")


def _process(args: argparse.Namespace):
    cfg = load_lazy_config(args)
    remove_earlier_run(cfg.train.output_dir, args)
    default_setup(cfg, args)
    logger = setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="kd_det")
    logger.info(f"Command: {sys.argv[0]} {shlex.join(sys.argv[1:])}")
    if not args.eval_only:
        return _train(cfg, config_file=args.config_file, resume=args.resume)
    model = instantiate(plain_student(cfg.model)).to(cfg.train.device)
    if not cfg.train.init_checkpoint:
        raise UserError("train.init_checkpoint is empty: there is nothing to evaluate")
    load_strictly(model, cfg.train.init_checkpoint, who="student")
    return evaluate_lazy(cfg, model)


def _check_and_launch(args: argparse.Namespace) -> None:
    train = load_lazy_config(args).train
    check_folder(train.output_dir, args)
    launch(_process, args, output_dir=train.output_dir, device=train.device)


def get_parser() -> argparse.ArgumentParser:
    return argument_parser(__doc__)


def main(argv: list[str] | None = None) -> None:
    run_tool(_check_and_launch, parse_arguments(get_parser(), argv))
