#!/usr/bin/env python
"""
Train or evaluate from a LazyConfig file: Detectron2's tools/lazyconfig_train_net.py for models that may be a Distiller.

    tools/lazyconfig_train_net.py --config-file configs/lazy/fcos_R_50_from_R_101_nst_1x.py
"""

import os

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_argument_parser, default_setup, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from kd_det import Distiller
from kd_det.cli import launch, run_tool
from kd_det.engine.step import TrainStep
from kd_det.errors import one_line
from kd_det.weights.checkpoint import SafeCheckpointer
from kd_det.weights.strict import load_strictly

KEYS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")


def load_config(args) -> DictConfig:
    try:
        cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    except (SyntaxError, HydraException, OmegaConfBaseException) as e:
        raise ValueError(f"{args.config_file}: {one_line(e)}") from e
    missing = [key for key in KEYS if key not in cfg]
    if missing:
        raise ValueError(f"{args.config_file} lacks {', '.join(missing)}: a config must name {', '.join(KEYS)}")
    return cfg


def plain_student(model: DictConfig) -> DictConfig:
    return model.student if model._target_ in (Distiller, "kd_det.distiller.Distiller") else model


def do_test(cfg, model):
    if "evaluator" not in cfg.dataloader:
        return None
    evaluator = cfg.dataloader.evaluator
    evaluator = [instantiate(e) for e in evaluator] if isinstance(evaluator, ListConfig) else instantiate(evaluator)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    print_csv_format(results)
    return results


def do_train(cfg, *, resume: bool):
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
        amp=cfg.train.amp.enabled,
        dump_dir=os.path.join(cfg.train.output_dir, "non_finite"),
    )
    checkpointer = SafeCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    main_only = []
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        main_only = [
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period),
        ]
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            *main_only[:1],
            hooks.EvalHook(cfg.train.eval_period, lambda: do_test(cfg, model)),
            *main_only[1:],
        ]
    )
    resumes = resume and checkpointer.has_checkpoint()
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    trainer.train(trainer.iter + 1 if resumes else 0, cfg.train.max_iter)


def main(args):
    cfg = load_config(args)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="kd_det")
    if not args.eval_only:
        return do_train(cfg, resume=args.resume)
    model = instantiate(plain_student(cfg.model)).to(cfg.train.device)
    if not cfg.train.init_checkpoint:
        raise ValueError("train.init_checkpoint is empty: there is nothing to evaluate")
    load_strictly(model, cfg.train.init_checkpoint, who="student")
    return do_test(cfg, model)


if __name__ == "__main__":
    run_tool(lambda: launch(main, default_argument_parser().parse_args()))
