"""Checkpoints on time and on request: a cluster's SIGTERM or a Ctrl-C finishes the step, saves and exits."""

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import hooks
from detectron2.utils import comm

__all__ = ["RESUMABLE", "CheckpointHook", "StopSignals", "any_rank", "handling_requests", "restartable"]

logger = logging.getLogger(__name__)

# Exit status of a run that was asked to stop, saved its state and can be resumed: EX_TEMPFAIL of sysexits.h.
RESUMABLE = 75


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process; all processes must call it."""
    if comm.get_world_size() == 1:
        return flag
    flags = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


@contextlib.contextmanager
def handling_requests(handler: Callable):
    """
    A context in which SIGTERM and SIGINT call ``handler(signum, frame)``. It changes nothing outside the main thread,
    where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signum: signal.signal(signum, handler) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)


def restartable():
    """A context, or decorator: a request to stop ends the process with ``RESUMABLE``, for there is nothing to save."""
    return handling_requests(lambda *_: sys.exit(RESUMABLE))


class StopSignals:
    """
    While ``handled()``, the first SIGTERM or SIGINT sets ``requested``; between steps, where ``between_steps``, it also
    ends the process by ``SystemExit(RESUMABLE)``, because an evaluation would take too long. A second SIGINT always
    interrupts, so that a user at a terminal does not have to wait.
    """

    def __init__(self):
        self.requested = ""  # the signal's name
        self.between_steps = False
        # Whether any rank was asked to stop, where the step has exchanged it; all ranks then hold the same.
        self.agreed: bool | None = None

    def handled(self):
        return handling_requests(self._request)

    def _request(self, signum, frame):
        if signum == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt
        first, self.requested = not self.requested, signal.Signals(signum).name
        if first and self.between_steps:
            raise SystemExit(RESUMABLE)


class CheckpointHook(hooks.PeriodicCheckpointer):
    """
    Detectron2's hook, on all ranks, because each contributes its random state. It also saves after a step at which
    any rank was asked to stop, and after one that was followed by an evaluation that did not end; then it ends
    training by ``SystemExit(RESUMABLE)``.
    """

    def __init__(self, checkpointer, period: int, eval_period: int, signals: StopSignals):
        """``eval_period``: after so many steps a hook behind this one evaluates, 0 for never."""
        super().__init__(checkpointer, period)
        self._signals = signals
        self._eval_period = eval_period
        self._can_save = False  # the step is whole, its random states are gathered, and it is not saved yet

    def before_step(self):
        self._signals.between_steps = self._can_save = False
        self._signals.agreed = None

    def after_step(self):
        number = self.trainer.iter + 1
        stop = self._signals.agreed
        if stop is None:
            stop = any_rank(bool(self._signals.requested))
        last = number >= self.max_iter
        on_time = last or number % self.period == 0
        evaluates = self._eval_period > 0 and number % self._eval_period == 0
        if on_time or stop or evaluates:
            self.trainer.gather_random_states()
        super().after_step()
        if stop and not on_time:
            self._save()
        if on_time or stop:
            # No rank ends before rank 0 has saved, and another one may have been asked to stop meanwhile.
            stop = any_rank(bool(self._signals.requested))
        if stop and not last:
            reason = self._signals.requested or "another process"
            logger.warning(f"Stopped by {reason} after iteration {number - 1}; all is saved, continue with --resume.")
            raise SystemExit(RESUMABLE)
        self._can_save = evaluates and not on_time
        self._signals.between_steps = on_time or evaluates

    def after_train(self):
        if self._can_save:
            self._save()
        super().after_train()

    def _save(self):
        self.save(f"{self.file_prefix}_{self.trainer.iter:07d}", iteration=self.trainer.iter)
