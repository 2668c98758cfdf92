"""
Compare finished or running trainings: one table (text, Markdown, CSV), and the curves of AP and of every loss (PNG and
SVG). Only their metrics.json and config.yaml are read.

    kd-det compare output/alone output/distilled --output comparison
    kd-det compare alone=out/alone_seed0,out/alone_seed1 distilled=out/distilled_seed0,out/distilled_seed1

Several folders of one name are seeds of one run: the table has their mean and standard deviation, the curves a band.
"""

import argparse
import os

from tqdm import tqdm

from kd_det.cli.arguments import describe
from kd_det.cli.run_folder import open_runs, summarize
from kd_det.cli.run_tool import run_tool
from kd_det.visualization import TABLE_FORMATS, draw_curves, runs_table


def _compare(args: argparse.Namespace) -> None:
    runs = open_runs(args.runs)
    rows = [summarize(name, folders) for name, folders in tqdm(runs.items(), "reading", unit="run", disable=None)]
    os.makedirs(args.output, exist_ok=True)
    for form in TABLE_FORMATS:
        with open(os.path.join(args.output, f"table.{form}"), "w") as file:
            file.write(runs_table(rows, form) + "\n")
    histories = {name: [folder.history for folder in folders] for name, folders in runs.items()}
    curves = draw_curves(os.path.join(args.output, "curves"), histories)
    print(runs_table(rows))
    print(f"\n{args.output}: {', '.join(f'table.{form}' for form in TABLE_FORMATS)}, ", end="")
    print(", ".join(map(os.path.basename, curves)))
    print(f"Next, one page with pictures: kd-det report {' '.join(args.runs)}")


def add_runs(parser: argparse.ArgumentParser) -> None:
    text = "the OUTPUT_DIR of a training; NAME=FOLDER,FOLDER gives it a name, and several seeds"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=text)


def get_parser() -> argparse.ArgumentParser:
    parser = describe(argparse.ArgumentParser(), __doc__)
    add_runs(parser)
    parser.add_argument("--output", default="comparison", metavar="FOLDER", help="default %(default)s")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_compare, get_parser().parse_args(argv))
