"""Several configs, several seeds, one table."""

import os
import subprocess
from typing import List, Sequence

import numpy as np
import yaml
from tabulate import tabulate

from kd_det.classification.data import register_configured
from kd_det.classification.trainer import ClassificationTrainer, check_trainer
from kd_det.cli import argument_parser, check_run, parse_arguments
from kd_det.study.runs import Run

__all__ = ["compare"]


def compare(
    config_files: Sequence[str], seeds: Sequence[int], opts: Sequence[str], *, tool: str, num_gpus: int = 1
) -> str:
    """
    Train each config with each seed, one after the other, in processes of their own. Runs that are complete already
    are read, not repeated, and interrupted ones are resumed. All configs are checked before the first run.

    Args:
        config_files: of tools/pretrain_backbone.py. A run writes to ``OUTPUT_DIR/seed_<seed>`` of its config.
        seeds: values of ``SEED``.
        opts: KEY VALUE pairs for all runs.
        tool: path of tools/pretrain_backbone.py.
        num_gpus: of each run.

    Returns:
        A table: mean and standard deviation (over seeds, n - 1) of the final accuracies, and each seed's top-1.

    Raises:
        ValueError: a config that does not exist or would not run, options that are no pairs, a folder with a run of
            another config or teacher, or a run that failed; its own message is on stderr.
    """
    missing = [name for name in config_files if not os.path.isfile(name)]
    if missing or not config_files:
        raise ValueError(f"--compare needs .yaml files that exist; missing: {', '.join(missing) or 'all'}.")
    if len(opts) % 2:
        raise ValueError(f"Expected KEY VALUE pairs behind the configs, found {' '.join(opts)}.")
    arguments = ["--num-gpus", str(num_gpus)]
    runs = {name: [_run(name, seed, list(opts), tool, arguments) for seed in seeds] for name in config_files}
    for config_file, (first, *_) in runs.items():
        try:
            _check(first)
        except (ValueError, OSError) as e:
            raise ValueError(f"{config_file}: {e}") from e
    for run in (run for group in runs.values() for run in group):
        _check_folder(run)
    rows = []
    for config_file, group in runs.items():
        for run in group:
            run.complete(log=subprocess.DEVNULL)
        results = [run.metrics() for run in group]
        top1, top5 = (np.array([r[f"classification/top{k}"] for r in results]) for k in (1, 5))
        name = os.path.splitext(os.path.relpath(config_file, os.path.dirname(config_files[0])))[0]
        each = " ".join(f"{value:.1f}" for value in top1)
        rows.append([name, _mean_and_spread(top1), _mean_and_spread(top5), each, f"{results[0]['time']:.2f}"])
    headers = ["config", "top-1", "top-5", f"top-1 of seeds {' '.join(map(str, seeds))}", "s/step"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _mean_and_spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def _run(config_file: str, seed: int, opts: List[str], tool: str, arguments: List[str]) -> Run:
    output = os.path.join(_output_dir(config_file, opts), f"seed_{seed}")
    arguments = [*arguments, "--config-file", config_file, *opts, "SEED", str(seed)]
    run = Run(f"{config_file} with seed {seed}", tool, output, arguments, task="classification")
    teacher = run.cfg().KD.TEACHER.WEIGHTS
    if os.path.isfile(teacher):
        run.inputs.append(teacher)
    return run


def _check(run: Run) -> None:
    cfg = run.cfg()
    register_configured(cfg)
    check_trainer(cfg, ClassificationTrainer)
    check_run(cfg, parse_arguments(argument_parser(), run.command[1:]))


def _check_folder(run: Run) -> None:
    """Run.complete would remove an older run: let it be no more than the log of one that failed."""
    is_trained = os.path.isfile(os.path.join(run.output_dir, "last_checkpoint"))
    if run.holds_other_files() or (is_trained and run.state() == "new"):
        raise ValueError(
            f"{run.output_dir} holds a run of another config, or of a teacher that was replaced since, or other files. "
            f"Remove it, or choose another folder: OUTPUT_DIR FOLDER behind the configs."
        )


def _output_dir(config_file: str, opts: Sequence[str]) -> str:
    given = dict(zip(opts[::2], opts[1::2]))
    if "OUTPUT_DIR" in given:
        return os.path.join(given["OUTPUT_DIR"], os.path.splitext(os.path.basename(config_file))[0])
    with open(config_file) as f:
        config = yaml.safe_load(f)
    if "OUTPUT_DIR" not in config:
        raise ValueError(f"{config_file} sets no OUTPUT_DIR, so that its runs would overwrite those of other configs.")
    return config["OUTPUT_DIR"]
