"""One run an ``OUTPUT_DIR``."""

import contextlib
import logging
import os
import socket

from detectron2.utils import comm

from kd_det.errors import UserError, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["sole_run"]

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextlib.contextmanager
def sole_run(output_dir: str):
    """
    A context, or decorator, in which no other run may use an output folder (empty: none is locked). All ranks enter
    it before they write anything; rank 0 holds the lock. The kernel drops it when that process ends, however it ends;
    the file that stays locks nothing.

    Raises:
        UserError: another run is in there (names its host and process), or the folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        problem = ""
        if comm.is_main_process() and fcntl is not None and output_dir and "://" not in output_dir:
            try:
                os.makedirs(output_dir, exist_ok=True)
                problem = _lock(stack.enter_context(open(os.path.join(output_dir, LOCK_FILE), "a+")))
            except OSError as e:
                problem = one_line(e)
        if problem := comm.all_gather(problem)[0]:
            raise UserError(f"OUTPUT_DIR {output_dir}: {problem}")
        yield


def _lock(file) -> str:
    """What keeps a lock from being taken; empty: it is, or the file system knows no locks."""
    try:
        # lockf's locks, unlike flock's, are not inherited by workers of a data loader, which outlive a killed trainer.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return f"another run is in there, {file.read().strip()}. Wait for its end, or choose another OUTPUT_DIR."
    except OSError as e:
        logger.warning(f"{one_line(e)}: the file system of OUTPUT_DIR has no locks; let no second run use the folder.")
    else:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return ""
