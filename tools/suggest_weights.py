#!/usr/bin/env python
"""
Measure the distillation losses of a config against the student's own losses, and propose weights.

    tools/suggest_weights.py --config-file configs/Quickstart/student_distilled.yaml --batches 10
    tools/suggest_weights.py --config-file any_student.yaml --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml
    tools/suggest_weights.py --config-file configs/Classification/Digits/nst.yaml

Measured at MODEL.WEIGHTS. The student's own losses shrink faster than most distillation losses, so a weight found at
the start of training is a starting point, not an optimum.
"""

import itertools

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from kd_det.classification.data import register_configured
from kd_det.classification.trainer import trainer_class
from kd_det.cli import argument_parser, check_run, load_config, parse_arguments, run_tool
from kd_det.engine.loss_sizes import format_sizes, measure_losses
from kd_det.weights.checkpoint import SafeCheckpointer


def main(args):
    cfg = load_config(args)
    register_configured(cfg)
    check_run(cfg, args)
    model = build_model(cfg).train()
    SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    batches = itertools.islice(trainer_class(cfg).build_train_loader(cfg), args.batches)
    with EventStorage():
        sizes = measure_losses(model, batches, share=args.share)
    print(format_sizes(sizes))
    for size in sizes[1:]:
        if size.proposed is not None:
            print(f"KD.{size.name.upper()}.WEIGHT {size.proposed:.3g}", end=" ")
    print()


def get_parser():
    parser = argument_parser()
    parser.add_argument("--batches", type=int, default=8, help="training batches to measure on")
    parser.add_argument(
        "--share", type=float, default=0.5, help="gradient wanted, as a part of the student's own losses'"
    )
    return parser


if __name__ == "__main__":
    run_tool(main, parse_arguments(get_parser()))
