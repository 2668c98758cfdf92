"""
Export a trained student as a folder for plain Detectron2: config.yaml, model.pth, a README of how to load them.

    kd-det export --config-file output/config.yaml --weights output/model_final.pth --output exported
    kd-det export --config-file mine.yaml --weights output/model_final.pth --output exported --half --image a.jpg
"""

import argparse
import os

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data.detection_utils import read_image
from omegaconf import OmegaConf

from kd_det.cli.arguments import config_parser, is_lazy, load_config, parse_arguments
from kd_det.cli.lazy_config import load_lazy_config, plain_student
from kd_det.cli.run_tool import run_tool
from kd_det.errors import UserError
from kd_det.weights.export import export_student
from kd_det.weights.strict import load_strictly


def _export(args: argparse.Namespace) -> None:
    if is_lazy(args):
        return _export_lazy(args)
    cfg = load_config(args)
    images = [torch.from_numpy(read_image(path, cfg.INPUT.FORMAT).transpose(2, 0, 1).copy()) for path in args.image]
    options = {"half": args.half, "trace": args.trace, "images": [image.float() for image in images]}
    report = export_student(cfg, args.weights, args.output, **options)
    before, after = report.num_detections
    print(f"{report.folder}: {', '.join(report.files)}; {report.num_parameters:,} parameters")
    print(f"  needs Detectron2{''.join(f' and {name}' for name in report.needs)}, not kd_det")
    print(f"  check run: relative error of the maps {report.feature_error:.2g}, detections {before} -> {after}")
    print(f"  next: {report.folder}/README.md shows how to load it")


def _export_lazy(args: argparse.Namespace) -> None:
    """The student of a LazyConfig, as a LazyConfig's yaml with its weights."""
    if args.half or args.trace or args.image:
        raise UserError("--half, --trace and --image are for yaml configs")
    if os.path.lexists(args.output) and (not os.path.isdir(args.output) or os.listdir(args.output)):
        raise UserError(f"{args.output!r} is no empty folder; the export needs one of its own")
    config = plain_student(load_lazy_config(args).model)
    model = instantiate(config)
    load_strictly(model, args.weights, who="student")
    os.makedirs(args.output, exist_ok=True)
    LazyConfig.save(OmegaConf.create({"model": config}), os.path.join(args.output, "config.yaml"))
    torch.save({"model": model.state_dict()}, os.path.join(args.output, "model.pth"))
    print(f"{args.output}: config.yaml, model.pth; {sum(p.numel() for p in model.parameters()):,} parameters")
    print("  load: instantiate(LazyConfig.load('config.yaml').model), its weights by DetectionCheckpointer")


def get_parser() -> argparse.ArgumentParser:
    parser = config_parser(__doc__, teacher=False)
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint of the training")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--half", action="store_true", help="save weights in float16, half the size")
    parser.add_argument("--trace", action="store_true", help="also save a TorchScript trace, model.ts")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="for the check run, repeatable")
    parser.set_defaults(eval_only=True)  # the plain student's config
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_export, parse_arguments(get_parser(), argv))
