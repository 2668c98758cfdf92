"""Several configs, several seeds, one table."""

import json
import os
import subprocess
import sys
from typing import Dict, List, Optional, Sequence

import numpy as np
import yaml
from tabulate import tabulate

from kd_det.classification.trainer import BACKBONE_FILE

__all__ = ["compare", "final_accuracy"]


def compare(config_files: Sequence[str], seeds: Sequence[int], opts: Sequence[str], *, tool: str) -> str:
    """
    Train each config with each seed, one after the other, in processes of their own. Runs that are complete already
    are read, not repeated.

    Args:
        config_files: of tools/pretrain_backbone.py. A run writes to ``OUTPUT_DIR/seed_<seed>`` of its config.
        seeds: values of ``SEED``.
        opts: KEY VALUE pairs for all runs.
        tool: path of tools/pretrain_backbone.py.

    Returns:
        A table: mean and standard deviation (over seeds, n - 1) of the final accuracies, and each seed's top-1.

    Raises:
        ValueError: a config that does not exist, options that are no pairs, or a run that failed; its own message is on
            stderr.
    """
    missing = [name for name in config_files if not os.path.isfile(name)]
    if missing or not config_files:
        raise ValueError(f"--compare needs .yaml files that exist; missing: {', '.join(missing) or 'all'}.")
    if len(opts) % 2:
        raise ValueError(f"Expected KEY VALUE pairs behind the configs, found {' '.join(opts)}.")
    rows = []
    for config_file in config_files:
        results = [_run(config_file, seed, list(opts), tool) for seed in seeds]
        top1, top5 = (np.array([r[f"classification/top{k}"] for r in results]) for k in (1, 5))
        name = os.path.splitext(os.path.relpath(config_file, os.path.dirname(config_files[0])))[0]
        each = " ".join(f"{value:.1f}" for value in top1)
        rows.append([name, _mean_and_spread(top1), _mean_and_spread(top5), each, f"{results[0]['time']:.2f}"])
    headers = ["config", "top-1", "top-5", f"top-1 of seeds {' '.join(map(str, seeds))}", "s/step"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _mean_and_spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def _run(config_file: str, seed: int, opts: List[str], tool: str) -> Dict[str, float]:
    output = os.path.join(_output_dir(config_file, opts), f"seed_{seed}")
    found = final_accuracy(output)
    if found is not None:
        print(f"{output}: already complete, reused", flush=True)
        return found
    print(f"{output}: training", flush=True)
    command = [sys.executable, tool, "--config-file", config_file, *opts, "OUTPUT_DIR", output, "SEED", str(seed)]
    log = subprocess.run(command, stdout=subprocess.DEVNULL)
    found = final_accuracy(output)
    if log.returncode or found is None:
        raise ValueError(f"{config_file} with seed {seed} ended with status {log.returncode} and no result in {output}")
    return found


def final_accuracy(output_dir: str) -> Optional[Dict[str, float]]:
    """The last metrics of a complete run: it wrote its backbone; None if there is none."""
    metrics = os.path.join(output_dir, "metrics.json")
    if not (os.path.isfile(os.path.join(output_dir, BACKBONE_FILE)) and os.path.isfile(metrics)):
        return None
    with open(metrics) as f:
        lines = [json.loads(line) for line in f]
    evaluated = [line for line in lines if "classification/top1" in line]
    times = [line["time"] for line in lines if "time" in line]
    return {**evaluated[-1], "time": float(np.median(times))} if evaluated and times else None


def _output_dir(config_file: str, opts: Sequence[str]) -> str:
    given = dict(zip(opts[::2], opts[1::2]))
    if "OUTPUT_DIR" in given:
        return os.path.join(given["OUTPUT_DIR"], os.path.splitext(os.path.basename(config_file))[0])
    with open(config_file) as f:
        config = yaml.safe_load(f)
    if "OUTPUT_DIR" not in config:
        raise ValueError(f"{config_file} sets no OUTPUT_DIR, so that its runs would overwrite those of other configs.")
    return config["OUTPUT_DIR"]
