"""Several configs, several seeds, one table."""

import os
import subprocess
from collections.abc import Mapping, Sequence

import numpy as np
from tabulate import tabulate

from kd_det.errors import UserError
from kd_det.study.runs import Run

__all__ = ["compare"]


def compare(runs: Mapping[str, Sequence[Run]]) -> str:
    """
    Train classifiers, one after the other, in processes of their own, see :meth:`Run.complete`.

    Args:
        runs: by the name of their row, the runs of each config, which differ in ``SEED``.

    Returns:
        A table: mean and standard deviation (over seeds, n - 1) of the final accuracies, and each seed's top-1.

    Raises:
        UserError: a folder with a run of another config or teacher, before the first run; or a run that failed.
    """
    for run in (run for group in runs.values() for run in group):
        # Run.complete moves or removes an older run: only the log of one that failed may be there.
        is_trained = os.path.isfile(os.path.join(run.output_dir, "last_checkpoint"))
        if run.holds_other_files() or (is_trained and run.state() == "new"):
            raise UserError(
                f"{run.output_dir} holds a run of another config, or of a teacher that was replaced since, or other "
                f"files. Remove it, or choose another folder: OUTPUT_DIR FOLDER behind the configs."
            )
    rows = []
    for name, group in runs.items():
        for run in group:
            run.complete(log=subprocess.DEVNULL)
        results = [run.metrics() for run in group]
        top1, top5 = (np.array([r[f"{group[0].task}/top{k}"] for r in results]) for k in (1, 5))
        each = " ".join(f"{value:.1f}" for value in top1)
        rows.append([name, _mean_and_spread(top1), _mean_and_spread(top5), each, f"{results[0]['time']:.2f}"])
    seeds = " ".join(str(run.cfg.SEED) for run in group)
    headers = ["config", "top-1", "top-5", f"top-1 of seeds {seeds}", "s/step"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _mean_and_spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"
