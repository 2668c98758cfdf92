#!/usr/bin/env python
"""
Export a trained student as a folder for plain Detectron2: config.yaml, model.pth, a README of how to load them.

    tools/export_student.py --config-file configs/... --weights output/model_final.pth --output exported
"""

import argparse

import torch
from detectron2.data.detection_utils import read_image

from kd_det.cli import load_config, run_tool
from kd_det.weights.export import export_student


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="of the training, or OUTPUT_DIR/config.yaml that it wrote")
    parser.add_argument("--weights", required=True, help="a checkpoint of the training")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--half", action="store_true", help="save weights in float16, half the size")
    parser.add_argument("--trace", action="store_true", help="also save a TorchScript trace, model.ts")
    parser.add_argument("--image", action="append", default=[], help="for the check run, may be repeated")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    parser.set_defaults(teacher=None, losses=None, eval_only=True)  # what load_config asks for besides
    return parser


def main(args):
    cfg = load_config(args)
    images = [torch.from_numpy(read_image(path, cfg.INPUT.FORMAT).transpose(2, 0, 1).copy()) for path in args.image]
    options = {"half": args.half, "trace": args.trace, "images": [image.float() for image in images]}
    report = export_student(cfg, args.weights, args.output, **options)
    before, after = report.num_detections
    print(f"{report.folder}: {', '.join(report.files)}; {report.num_parameters:,} parameters")
    print(f"  needs Detectron2{''.join(f' and {name}' for name in report.needs)}, not kd_det")
    print(f"  check run: relative error of the maps {report.feature_error:.2g}, detections {before} -> {after}")


if __name__ == "__main__":
    run_tool(main, get_parser().parse_args())
