"""
What distillation costs.

    tools/benchmark.py losses                                 # every founding loss at p2..p6 of an 800x1333 image
    tools/benchmark.py losses --losses nst --levels p5 --channels 2048
    tools/benchmark.py losses --device cuda --json losses.json
    tools/benchmark.py step --config-file configs/Quickstart/distilled.yaml --losses all
    tools/benchmark.py step --config-file student.yaml --teacher teacher.yaml --losses all --amp bfloat16
    tools/benchmark.py prices --config-file student.yaml --teacher teacher.yaml --losses NST,PKD,CWD

``losses`` times forward and backward of each loss beside its floor, the arithmetic that no implementation can avoid,
and measures the memory that the loss needs on top of the features, its gradient included. ``step`` times a training
step of the plain student, the teacher's features alone, and the distillation step, which take turns in the same run. On
a GPU both count kernels, and ``step`` the times that the host waits for the GPU. ``prices`` does the same for each loss
alone.
"""

import argparse
import json

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from kd_det.benchmark.losses import METHODS, measure_loss
from kd_det.benchmark.step import measure_prices, measure_step
from kd_det.cli import argument_parser, load_config
from kd_det.cli.run_tool import run_tool
from kd_det.cli.teacher import UNDECIDED
from kd_det.errors import UserError

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
    step.set_defaults(run=benchmark_step)
    text = "a training step with each loss alone"
    prices = commands.add_parser("prices", help=text, parents=[arguments], add_help=False)
    prices.set_defaults(run=benchmark_prices)
    for command in (step, prices):
        command.add_argument("--amp", choices=("float16", "bfloat16"), help="mixed precision; default: none")
    for command in (losses, step, prices):
        command.add_argument("--batch", type=int, default=2, help="images")
        command.add_argument("--threads", type=int, default=2, help="CPU threads")
        command.add_argument("--repeat", type=int, default=9, help="rounds of measurements")
        command.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    figures = {"torch": torch.__version__, "threads": args.threads, "repeat": args.repeat, **run_tool(args.run, args)}
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
    cfg = load_step_config(args)
    rows, ratio = measure_step(cfg, images=args.batch, amp=amp_type(args), repeat=args.repeat)
    print(f"losses: {', '.join(cfg.KD.LOSSES)}")
    table = [{key: value for key, value in row.items() if key != "waits by line"} for row in rows]
    print(tabulate(table, headers="keys", floatfmt=".4g"))
    print(f"distillation step / (plain step + teacher's features): {ratio:.3f}")
    return {**setting(args, cfg), "losses": list(cfg.KD.LOSSES), "ratio": ratio, "steps": rows}


def benchmark_prices(args: argparse.Namespace) -> dict:
    cfg = load_step_config(args)
    if not cfg.KD.LOSSES or cfg.KD.LOSSES == UNDECIDED:
        raise UserError("no losses to measure: name them, e.g. --losses NST,PKD or --losses all")
    rows = measure_prices(cfg, images=args.batch, amp=amp_type(args), repeat=args.repeat)
    print(tabulate(rows, headers="keys", floatfmt=".4g"))
    return {**setting(args, cfg), "prices": rows}


def load_step_config(args: argparse.Namespace) -> CfgNode:
    args.losses = ALL_LOSSES if args.losses == "all" else args.losses
    cfg = load_config(args)
    print(f"{args.batch} images on {cfg.MODEL.DEVICE}, {args.amp or 'float32'}")
    return cfg


def amp_type(args: argparse.Namespace) -> torch.dtype | None:
    return getattr(torch, args.amp) if args.amp else None


def setting(args: argparse.Namespace, cfg: CfgNode) -> dict:
    return {"device": cfg.MODEL.DEVICE, "amp": args.amp, "images": args.batch}
