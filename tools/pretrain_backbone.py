#!/usr/bin/env python
"""
Pretrain a backbone by image classification, with or without a teacher, or evaluate a classifier.

    tools/pretrain_backbone.py --config-file configs/Classification/ImageNet/R_50-R_18/nst_soft_targets.yaml
    tools/pretrain_backbone.py --seeds 0 1 2 --compare configs/Classification/Digits/[!Bt]*.yaml

Ends with OUTPUT_DIR/backbone.pkl, which a detector takes as MODEL.WEIGHTS. With --compare, it trains each config with
each seed and prints a table instead.
"""

import itertools
import os

from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from kd_det.classification.data import register_configured
from kd_det.classification.trainer import ClassificationTrainer, check_trainer
from kd_det.cli import argument_parser, check_run, launch, load_config, parse_arguments, run_tool
from kd_det.engine import evaluate
from kd_det.study.compare import compare


def setup(args):
    cfg = load_config(args)
    register_configured(cfg)
    return cfg


def main(args):
    cfg = setup(args)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_det")
    if args.eval_only:
        return evaluate(cfg, ClassificationTrainer, resume=args.resume)
    trainer = ClassificationTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def check_and_launch(args):
    if args.compare:
        alone = ("config_file", "resume", "eval_only", "teacher", "losses")
        if ignored := [f"--{name.replace('_', '-')}" for name in alone if getattr(args, name)]:
            raise ValueError(f"--compare trains the configs behind it; without {', '.join(ignored)}.")
        if args.num_machines > 1:
            raise ValueError("--compare runs on one machine.")
        # KEY VALUE pairs behind --compare are its values to argparse.
        files = list(itertools.takewhile(lambda name: name.endswith(".yaml"), args.compare))
        opts = args.compare[len(files) :] + args.opts
        print("\n" + compare(files, args.seeds, opts, tool=os.path.relpath(__file__), num_gpus=args.num_gpus))
        return
    cfg = setup(args)
    check_trainer(cfg, ClassificationTrainer)
    check_run(cfg, args)
    launch(main, args, cfg)


def get_parser():
    parser = argument_parser()
    parser.add_argument("--compare", nargs="+", metavar="CONFIG_FILE", help="train these and compare their accuracy")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of --compare, default 0 1 2")
    return parser


if __name__ == "__main__":
    run_tool(check_and_launch, parse_arguments(get_parser()))
