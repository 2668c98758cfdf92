"""
What distillation costs.

    tools/benchmark.py losses                                 # every founding loss at p2..p6 of an 800x1333 image
    tools/benchmark.py losses --losses nst --levels p5 --channels 2048
    tools/benchmark.py losses --device cuda --json losses.json
    tools/benchmark.py step --config-file configs/Quickstart/distilled.yaml --losses all
    tools/benchmark.py step --config-file student.yaml --teacher teacher.yaml --losses all --amp bfloat16

``losses`` times forward and backward of each loss beside its floor, the arithmetic that no implementation can avoid,
and measures the memory that the loss needs on top of the features, its gradient included. ``step`` times a training
step of the plain student, the teacher's features alone, and the distillation step. All take turns in the same run. On a
GPU both count kernels, and ``step`` the times that the host waits for the GPU.
"""

import argparse
import json

import torch
from tabulate import tabulate

from kd_det.benchmark.losses import METHODS, measure_loss
from kd_det.benchmark.step import measure_step
from kd_det.cli import argument_parser, load_config

__all__ = ["main"]

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
FOUNDING = ("nst", "at", "overhaul", "hint", "similarity")
ALL_LOSSES = "NST,AttentionTransfer,Overhaul,Similarity,Hint,SoftTarget"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    losses = commands.add_parser("losses", help="each loss beside the floor of its arithmetic")
    losses.add_argument("--device", default="cpu", help="cpu or cuda")
    losses.add_argument("--levels", nargs="+", choices=STRIDES, default=list(STRIDES), help="default: all")
    losses.add_argument("--losses", nargs="+", choices=METHODS, default=FOUNDING, help="default: the founding ones")
    losses.add_argument("--image-size", nargs=2, type=int, metavar=("H", "W"), default=(800, 1333))
    losses.add_argument("--channels", type=int, default=256, help="of student and teacher")
    losses.set_defaults(run=benchmark_losses)
    arguments = argument_parser()
    step = commands.add_parser("step", help="a training step with and without", parents=[arguments], add_help=False)
    step.add_argument("--amp", choices=("float16", "bfloat16"), help="mixed precision; default: none")
    step.set_defaults(run=benchmark_step)
    for command in (losses, step):
        command.add_argument("--batch", type=int, default=2, help="images")
        command.add_argument("--threads", type=int, default=2, help="CPU threads")
        command.add_argument("--repeat", type=int, default=9, help="rounds of measurements")
        command.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    figures = {"torch": torch.__version__, "threads": args.threads, "repeat": args.repeat, **args.run(args)}
    if args.json:
        with open(args.json, "w") as f:
            json.dump(figures, f, indent=2)


def benchmark_losses(args: argparse.Namespace) -> dict:
    # A pyramid's batches are padded to a multiple of 32. SP compares 512 pooled regions of 7x7 instead of maps.
    padded = [-(-side // 32) * 32 for side in args.image_size]
    shapes = [[args.batch, args.channels, *(-(-side // STRIDES[level]) for side in padded)] for level in args.levels]
    rows = [
        measure_loss(name, shape, device=args.device, repeat=args.repeat)
        for name in args.losses
        for shape in ([[512, args.channels, 7, 7]] if name == "similarity" else shapes)
    ]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    return {"device": args.device, "losses": rows}


def benchmark_step(args: argparse.Namespace) -> dict:
    args.losses = ALL_LOSSES if args.losses == "all" else args.losses
    cfg = load_config(args)
    amp = getattr(torch, args.amp) if args.amp else None
    rows, ratio = measure_step(cfg, images=args.batch, amp=amp, repeat=args.repeat)
    print(f"{args.batch} images on {cfg.MODEL.DEVICE}, {args.amp or 'float32'}; losses: {', '.join(cfg.KD.LOSSES)}")
    table = [{key: value for key, value in row.items() if key != "waits by line"} for row in rows]
    print(tabulate(table, headers="keys", floatfmt=".4g"))
    print(f"distillation step / (plain step + teacher's features): {ratio:.3f}")
    run = {"device": cfg.MODEL.DEVICE, "amp": args.amp, "images": args.batch, "losses": list(cfg.KD.LOSSES)}
    return {**run, "ratio": ratio, "steps": rows}
