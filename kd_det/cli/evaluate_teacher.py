"""
Evaluate the teacher of a config on DATASETS.TEST by the code that teaches: with its own normalisation and channel
order, at the size and padding of the student's images. A wrong teacher is seen in a minute.

    kd-det evaluate-teacher --config-file configs/Quickstart/distilled.yaml
    kd-det evaluate-teacher --config-file any_student.yaml --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml
    kd-det evaluate-teacher --config-file mine.yaml --teacher teacher.py --teacher-weights teacher.pth --images 100

With KD.TEACHER.EVALUATE True, a training does the same before its first step.
"""

import argparse

from detectron2.config import instantiate
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from kd_det.classification.trainer import is_classifier, trainer_class
from kd_det.cli.arguments import config_parser, is_lazy, load_config, parse_arguments
from kd_det.cli.checks import CLASSIFIER_CHECKS, DETECTOR_CHECKS, PlannedRun
from kd_det.cli.lazy_config import load_lazy_config
from kd_det.cli.lazy_train import evaluate_lazy
from kd_det.cli.run_tool import run_tool
from kd_det.distiller import Distiller
from kd_det.engine.teacher_evaluation import TeacherDetector, evaluate_teacher, register_first_images
from kd_det.errors import UserError
from kd_det.student import build_student
from kd_det.teachers import build_teacher


def _evaluate(args: argparse.Namespace) -> None:
    if args.images < 0:
        raise UserError(f"--images must be at least 1, found {args.images}")
    setup_logger()
    results = (_of_lazy_config if is_lazy(args) else _of_yaml_config)(args)
    print(tabulate(flatten_results_dict(results).items(), headers=("teacher", ""), floatfmt=".2f"))
    print("Next: kd-det train with the same arguments, if that is the teacher you know.")


def _of_yaml_config(args: argparse.Namespace) -> dict:
    cfg = load_config(args).clone()
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: there is nothing to evaluate on")
    args.eval_only = True  # no training set is read
    run = PlannedRun(cfg, args)
    for check in CLASSIFIER_CHECKS if is_classifier(cfg) else DETECTOR_CHECKS:
        check(run)
    cfg.defrost()
    cfg.MODEL.TIMM.WEIGHTS = ""  # the student is not trained
    teacher = build_teacher(cfg)
    if args.images:
        cfg.DATASETS.TEST = tuple(register_first_images(name, args.images) for name in cfg.DATASETS.TEST)
    return evaluate_teacher(cfg, build_student(cfg), teacher, trainer_class(cfg))


def _of_lazy_config(args: argparse.Namespace) -> dict:
    if args.images:
        raise UserError("--images is for yaml configs: choose images in dataloader.test")
    cfg = load_lazy_config(args)
    model = instantiate(cfg.model).to(cfg.train.device)
    if not isinstance(model, Distiller):
        raise UserError("the config has no teacher to evaluate: name one by --teacher")
    detector = TeacherDetector(model.student, model.teacher.to(cfg.train.device), input_format=model.input_format)
    results = evaluate_lazy(cfg, detector)
    if results is None:
        raise UserError("the config has no dataloader.evaluator: there is nothing to evaluate by")
    return results


def get_parser() -> argparse.ArgumentParser:
    parser = config_parser(__doc__)
    text = "evaluate on so many images of each data set (COCO's measures); default: all"
    parser.add_argument("--images", type=int, default=0, metavar="N", help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_evaluate, parse_arguments(get_parser(), argv))
