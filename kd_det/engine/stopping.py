"""Checkpoints on time and on request: a cluster's SIGTERM or a Ctrl-C finishes the step, saves and exits."""

import logging
import signal
import threading

from detectron2.engine import hooks
from detectron2.utils import comm

from kd_det.engine.step import any_rank

__all__ = ["RESUMABLE", "CheckpointHook", "StopSignals"]

logger = logging.getLogger(__name__)

# Exit status of a run that was asked to stop, saved its state and can be resumed: EX_TEMPFAIL of sysexits.h.
RESUMABLE = 75


class StopSignals:
    """
    While entered, SIGTERM and SIGINT only set ``requested``; but they end the process at once, by
    ``SystemExit(RESUMABLE)``, while nothing has changed since the last checkpoint (in an evaluation, say). A second
    SIGINT interrupts in any case, so that a user at a terminal does not have to wait.
    """

    def __init__(self):
        self.requested = ""  # the signal's name
        self.all_saved = False
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(self, *exc_info):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _request(self, signum, frame):
        if signum == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt
        if self.all_saved:
            raise SystemExit(RESUMABLE)
        self.requested = signal.Signals(signum).name


class CheckpointHook(hooks.PeriodicCheckpointer):
    """
    Detectron2's, on all ranks, because each brings its random state; and after any step at which one of them was
    asked to stop. Then it ends training by ``SystemExit(RESUMABLE)``.
    """

    def __init__(self, checkpointer, period: int, signals: StopSignals):
        super().__init__(checkpointer, period)
        self._signals = signals

    def before_step(self):
        self._signals.all_saved = False

    def after_step(self):
        iteration = self.trainer.iter
        stop = any_rank(bool(self._signals.requested))
        on_time = (iteration + 1) % self.period == 0
        last = iteration >= self.max_iter - 1
        if on_time or last or stop:
            self.trainer.gather_random_states()
        super().after_step()
        if stop and not last:
            if not on_time:
                self.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration)
            reason = self._signals.requested or "another process"
            logger.warning(f"Stopped by {reason} after iteration {iteration}; all is saved, continue with --resume.")
            comm.synchronize()  # nobody ends before rank 0 has saved
            raise SystemExit(RESUMABLE)
        self._signals.all_saved = on_time or last
