"""Trainings in processes of their own: repeated only if they must be, resumed where they were interrupted."""

import contextlib
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from typing import IO

from detectron2.config import CfgNode

from kd_det.engine.lock import LOCK_FILE
from kd_det.errors import UserError
from kd_det.study.run_config import holds_config
from kd_det.visualization.history import read_history

__all__ = ["Run", "read_metrics", "run_command"]


def read_metrics(output_dir: str, task: str = "bbox") -> dict[str, float]:
    """
    The last evaluation of a run (of the evaluator's task, e.g. "bbox" or "classification") and its speed.

    Returns:
        The last value of every ``<task>/...`` key (in percent), and ``time``, the median of the seconds a training
        step took (Detectron2 leaves out the first three). Empty if there is no evaluation.
    """
    history = read_history(output_dir)
    ret = {key: value for key, value in history.last().items() if key.startswith(f"{task}/")}
    if ret and "time" in history.values:
        ret["time"] = statistics.median(history.values["time"].values())
    return ret


@dataclass(eq=False)
class Run:
    """
    One training.

    Attributes:
        name: what messages call it.
        command: the command of kd_det and its arguments, without ``OUTPUT_DIR``; they end with KEY VALUE pairs, if any.
        cfg: the config that they describe, with its ``OUTPUT_DIR``.
        inputs: files that it is made from.
        task: of its evaluator, see :func:`read_metrics`.
    """

    name: str
    command: list[str]
    cfg: CfgNode
    inputs: list[str] = field(default_factory=list)
    task: str = "bbox"

    @property
    def output_dir(self) -> str:
        return self.cfg.OUTPUT_DIR

    @property
    def weights(self) -> str:
        return os.path.join(self.output_dir, "model_final.pth")

    def metrics(self) -> dict[str, float]:
        return read_metrics(self.output_dir, self.task)

    def state(self) -> str:
        """
        "finished", "interrupted" (to be resumed) or "new". Finished is a run with this config, in what it uses, that
        was evaluated after its last step, and whose checkpoint is younger than what it was made from.
        """
        if not holds_config(self.output_dir, self.cfg):
            return "new"
        is_trained = os.path.isfile(self.weights)
        latest = self.weights if is_trained else os.path.join(self.output_dir, "last_checkpoint")
        if not os.path.isfile(latest) or any(os.path.getmtime(x) > os.path.getmtime(latest) for x in self.inputs):
            return "new"
        return "finished" if is_trained and self.metrics() else "interrupted"

    def holds_other_files(self) -> bool:
        """Whether something is in its folder, but no run."""
        found = set(os.listdir(self.output_dir)) if os.path.isdir(self.output_dir) else set()
        return bool(found - {LOCK_FILE}) and "config.yaml" not in found

    def complete(self, *, log: int | None = None) -> None:
        """
        Train it, resume it, or leave it as it is, by its state, and print which. A finished run of another config, or
        older than its inputs, is moved to ``<output_dir>.old``; what was not finished is removed. ``log`` is where its
        output goes, as of ``subprocess.run``; errors are always shown.

        Raises:
            UserError: the training failed and has printed why, or the folder holds files that are no run.
        """
        if command := self.prepare():
            run_command(command, log=log)

    def prepare(self) -> list[str]:
        """
        What :meth:`complete` has to run, as ``python *command``; empty for a finished run. Prints the state, moves or
        removes another run.
        """
        state = self.state()
        if state == "finished":
            print(f"{self.name}: {self.weights} is there, reused", flush=True)
            return []
        resume = ["--resume"] if state == "interrupted" else []
        if resume:
            print(f"{self.name}: interrupted in {self.output_dir}, resumed", flush=True)
        elif self.holds_other_files():
            raise UserError(
                f"{self.name}: {self.output_dir} holds files, but no run (no config.yaml). Remove it, or choose "
                f"another folder."
            )
        elif os.path.isfile(self.weights):  # it may have taken days
            old = f"{self.output_dir}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.output_dir, old)
            print(f"{self.name}: of another config, or older than what it is made from; moved to {old}", flush=True)
        else:
            shutil.rmtree(self.output_dir, ignore_errors=True)
        name, *arguments = self.command
        return ["-m", "kd_det", name, *resume, *arguments, "OUTPUT_DIR", self.output_dir]


def run_command(command: list[str], *, log: int | None = None) -> None:
    """Print and run ``python *command``, its output as of :meth:`Run.complete`; ``UserError`` if it failed."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    with interrupts_left_to_commands():
        check(command, start(command, log=log).wait())


def start(command: list[str], *, log: int | IO | None = None) -> subprocess.Popen:
    """Start ``python *command``."""
    return subprocess.Popen([sys.executable, "-W", "ignore", *command], stdout=log)


def check(command: list[str], status: int) -> None:
    """``UserError`` for a command that failed."""
    if status:
        raise UserError(f"python {' '.join(command[:3])} ended with exit status {status}; run this again to continue")


@contextlib.contextmanager
def interrupts_left_to_commands():
    """Ctrl-C reaches the commands as well, which save what they have: wait for that, and do not end before them."""
    interrupt = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
