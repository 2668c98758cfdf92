"""
Measure the distillation losses of a config against the student's own losses, and propose weights.

    kd-det weights --config-file configs/Quickstart/distilled.yaml --batches 10
    kd-det weights --config-file any_student.yaml --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml
    kd-det weights --config-file configs/Classification/Digits/nst.yaml

Measured at MODEL.WEIGHTS. The student's own losses shrink faster than most distillation losses, so a weight found at
the start of training is a starting point, not an optimum.
"""

import argparse
import itertools
from collections.abc import Iterable

from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from kd_det.classification.trainer import trainer_class
from kd_det.cli.arguments import config_parser, is_lazy, load_config, parse_arguments
from kd_det.cli.checks import check_run
from kd_det.cli.lazy_config import load_lazy_config
from kd_det.cli.run_tool import run_tool
from kd_det.distiller import Distiller
from kd_det.engine.loss_sizes import format_sizes, measure_losses
from kd_det.errors import UserError
from kd_det.weights.checkpoint import SafeCheckpointer


def _model_and_batches(args: argparse.Namespace) -> tuple[Distiller, Iterable[list[dict]]]:
    if is_lazy(args):
        cfg = load_lazy_config(args)
        model, weights = instantiate(cfg.model).to(cfg.train.device), cfg.train.init_checkpoint
        batches = instantiate(cfg.dataloader.train)
    else:
        cfg = check_run(load_config(args), args)
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
        batches = trainer_class(cfg).build_train_loader(cfg)
    if not isinstance(model, Distiller):
        raise UserError("the config has no distillation losses to measure: name a teacher by --teacher")
    if not getattr(model.student, "needs_labels", True):
        raise UserError(f"{type(model.student).__name__} has no losses of its own to measure the others against")
    SafeCheckpointer(model, save_to_disk=False).load(weights)
    return model.train(), batches


def _propose(args: argparse.Namespace) -> None:
    model, batches = _model_and_batches(args)
    batches = tqdm(itertools.islice(batches, args.batches), "measuring", args.batches, unit="batch", disable=None)
    with EventStorage():
        sizes = measure_losses(model, batches, share=args.share)
    print(format_sizes(sizes))
    # The weights of further teachers' losses stand in their LOSS_OPTS, in KD.TEACHERS.
    proposed = [size for size in sizes if size.proposed is not None and not model.losses[size.name].teacher_name]
    print("Next: append these to kd-det train, or write them into the config:")
    print(*(f"KD.{size.name.upper()}.WEIGHT {size.proposed:.3g}" for size in proposed))


def get_parser() -> argparse.ArgumentParser:
    parser = config_parser(__doc__)
    parser.add_argument("--batches", type=int, default=8, help="training batches to measure on")
    text = "gradient wanted, as a part of the student's own losses'"
    parser.add_argument("--share", type=float, default=0.5, help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_propose, parse_arguments(get_parser(), argv))
