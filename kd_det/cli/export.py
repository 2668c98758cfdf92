"""
Export a trained student as a folder for plain Detectron2: config.yaml, model.pth, a README of how to load them.

    kd-det export --config-file output/config.yaml --weights output/model_final.pth --output exported
    kd-det export --config-file mine.yaml --weights output/model_final.pth --output exported --half --image a.jpg
"""

import argparse

import torch
from detectron2.data.detection_utils import read_image

from kd_det.cli.arguments import config_parser, load_config, parse_arguments
from kd_det.cli.run_tool import run_tool
from kd_det.weights.export import export_student

__all__ = ["get_parser", "main"]


def _export(args: argparse.Namespace) -> None:
    cfg = load_config(args)
    images = [torch.from_numpy(read_image(path, cfg.INPUT.FORMAT).transpose(2, 0, 1).copy()) for path in args.image]
    options = {"half": args.half, "trace": args.trace, "images": [image.float() for image in images]}
    report = export_student(cfg, args.weights, args.output, **options)
    before, after = report.num_detections
    print(f"{report.folder}: {', '.join(report.files)}; {report.num_parameters:,} parameters")
    print(f"  needs Detectron2{''.join(f' and {name}' for name in report.needs)}, not kd_det")
    print(f"  check run: relative error of the maps {report.feature_error:.2g}, detections {before} -> {after}")


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
