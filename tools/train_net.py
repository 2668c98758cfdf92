#!/usr/bin/env python
"""
Train a detector with or without a teacher, or evaluate it: Detectron2's tools/train_net.py for configs with KD keys.

    tools/train_net.py --config-file configs/Quickstart/student_R_18_FPN.yaml
    tools/train_net.py --config-file any_student.yaml --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml
"""

from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from kd_det.classification.trainer import check_trainer
from kd_det.cli import argument_parser, check_run, launch, load_config, parse_arguments, run_tool
from kd_det.engine import Trainer, evaluate


def main(args):
    cfg = load_config(args)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_det")
    if args.eval_only:
        return evaluate(cfg, Trainer, resume=args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def check_and_launch(args):
    cfg = load_config(args)
    check_trainer(cfg, Trainer)
    check_run(cfg, args)
    launch(main, args, cfg)


if __name__ == "__main__":
    run_tool(check_and_launch, parse_arguments(argument_parser()))
