"""
Pretrain a backbone by image classification, with or without a teacher, or without labels by a teacher's features; or
evaluate it.

    kd-det pretrain --config-file configs/Classification/ImageNet/R_50-R_18/nst_soft_targets.yaml
    kd-det pretrain --config-file configs/Classification/Unlabelled/dinov2_R_18.yaml
    kd-det pretrain --seeds 0 1 2 --compare configs/Classification/Digits/[!Bt]*.yaml

Ends with OUTPUT_DIR/backbone.pkl, which a detector takes as MODEL.WEIGHTS. With --compare, it trains each config with
each seed and prints a table instead.
"""

import argparse
import itertools
import os

import yaml

from kd_det.classification.trainer import ClassificationTrainer, check_trainer
from kd_det.cli.arguments import argument_parser, load_config, parse_arguments
from kd_det.cli.checks import check_run
from kd_det.cli.run_tool import run_tool
from kd_det.cli.train import check_and_launch
from kd_det.errors import UserError
from kd_det.student import student_class
from kd_det.study.compare import compare
from kd_det.study.runs import Run


def planned_runs(files: list[str], seeds: list[int], opts: list[str], *, num_gpus: int = 1) -> dict[str, list[Run]]:
    """
    The runs of --compare, checked, with the KEY VALUE pairs of all. A run writes to ``OUTPUT_DIR/seed_<seed>`` of its
    config. ``ValueError`` for a config that does not exist or would not run, or options that are no pairs.
    """
    missing = [name for name in files if not os.path.isfile(name)]
    if missing or not files:
        raise UserError(f"--compare needs .yaml files that exist; missing: {', '.join(missing) or 'all'}.")
    if len(opts) % 2:
        raise UserError(f"Expected KEY VALUE pairs behind the configs, found {' '.join(opts)}.")
    runs = {}
    for path in files:
        name = os.path.splitext(os.path.relpath(path, os.path.dirname(files[0])))[0]
        try:
            runs[name] = [_run(path, seed, opts, num_gpus) for seed in seeds]
            check_trainer(runs[name][0].cfg, ClassificationTrainer)
            check_run(runs[name][0].cfg, _arguments(runs[name][0].command[1:]))
        except (ValueError, OSError) as e:
            raise UserError(f"{path}: {e}") from e
    return runs


def _run(path: str, seed: int, opts: list[str], num_gpus: int) -> Run:
    output_dir = os.path.join(_output_dir(path, opts), f"seed_{seed}")
    command = ["pretrain", "--num-gpus", str(num_gpus), "--config-file", path, *opts, "SEED", str(seed)]
    cfg = load_config(_arguments([*command[1:], "OUTPUT_DIR", output_dir]))
    inputs = list(filter(os.path.isfile, [cfg.KD.TEACHER.WEIGHTS]))
    task = "classification" if getattr(student_class(cfg), "needs_labels", True) else "linear"
    return Run(f"{path} with seed {seed}", command, cfg, inputs, task=task)


def _arguments(argv: list[str]) -> argparse.Namespace:
    """A run that replaces or resumes what its folder holds, see :meth:`Run.complete`."""
    return parse_arguments(argument_parser(), ["--overwrite", *argv])


def _output_dir(path: str, opts: list[str]) -> str:
    given = dict(zip(opts[::2], opts[1::2]))
    if "OUTPUT_DIR" in given:
        return os.path.join(given["OUTPUT_DIR"], os.path.splitext(os.path.basename(path))[0])
    with open(path) as f:
        config = yaml.safe_load(f)
    if "OUTPUT_DIR" not in config:
        raise UserError("it sets no OUTPUT_DIR, so that its runs would overwrite those of other configs")
    return config["OUTPUT_DIR"]


def _pretrain(args: argparse.Namespace) -> None:
    if not args.compare:
        return check_and_launch(args, ClassificationTrainer)
    alone = ("config_file", "resume", "eval_only", "teacher", "losses")
    if ignored := [f"--{name.replace('_', '-')}" for name in alone if getattr(args, name)]:
        raise UserError(f"--compare trains the configs behind it; without {', '.join(ignored)}.")
    if args.num_machines > 1:
        raise UserError("--compare runs on one machine.")
    # KEY VALUE pairs behind --compare are its values to argparse.
    files = list(itertools.takewhile(lambda name: name.endswith(".yaml"), args.compare))
    opts = args.compare[len(files) :] + args.opts
    print("\n" + compare(planned_runs(files, args.seeds, opts, num_gpus=args.num_gpus)))


def get_parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__)
    parser.add_argument("--compare", nargs="+", metavar="CONFIG_FILE", help="train these and compare their accuracy")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of --compare, default 0 1 2")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_tool(_pretrain, parse_arguments(get_parser(), argv))
