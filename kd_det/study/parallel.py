"""Many trainings, several at a time."""

import os
import shlex
import time
from collections.abc import Callable, Sequence

from kd_det.errors import UserError
from kd_det.study.runs import Run, check, interrupts_left_to_commands, start

__all__ = ["complete_all"]

SECONDS_BETWEEN_LOOKS = 0.2


def complete_all(runs: Sequence[Run], *, jobs: int, finished: Callable[[Run], None] = lambda run: None) -> None:
    """
    :meth:`Run.complete` for all, each in a process of its own; what it prints goes to ``<output_dir>.log``.

    Args:
        runs: in order; one that another needs (its weights are among the other's ``inputs``) stands before it.
        jobs: how many train at the same time.
        finished: called after each.

    Raises:
        UserError: a training failed; those beside it are waited for, no others are started.
    """
    waiting, running = list(runs), {}
    with interrupts_left_to_commands():
        while waiting or running:
            for run in [run for run, (_, process) in running.items() if process.poll() is not None]:
                command, process = running.pop(run)
                try:
                    check(command, process.returncode)
                except UserError as e:
                    for _, other in running.values():
                        other.wait()
                    raise UserError(f"{run.name}: {e}; see {_log(run)}") from e
                finished(run)
            made = {one.weights for one in [*waiting, *running]}
            ready = [run for run in waiting if not made & set(run.inputs)]
            if ready and len(running) < jobs:
                run = ready[0]
                waiting.remove(run)
                if command := run.prepare():
                    print(f"{run.name}: {len(waiting)} more wait; python {shlex.join(command)}", flush=True)
                    os.makedirs(os.path.dirname(_log(run)), exist_ok=True)
                    with open(_log(run), "a") as log:
                        running[run] = command, start(command, log=log)
                else:
                    finished(run)
            else:
                time.sleep(SECONDS_BETWEEN_LOOKS)


def _log(run: Run) -> str:
    return f"{run.output_dir}.log"
