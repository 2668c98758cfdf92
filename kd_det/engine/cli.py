"""How tools end: with one line for what a user can mend, with a traceback only for a defect."""

import sys
from collections.abc import Callable

from detectron2.utils import comm

__all__ = ["RESUMABLE", "USER_ERRORS", "UserError", "run_tool"]

# Exit status of a run that was asked to stop, saved its state and can be resumed: EX_TEMPFAIL of sysexits.h.
RESUMABLE = 75

# What a user can cause and mend. Anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, FloatingPointError, OSError)


class UserError(ValueError):
    """What a user can cause and mend, said in one line."""


def run_tool(main: Callable, *args):
    """
    Call ``main(*args)``; an error that a user can mend becomes one line on stderr and exit status 1.

    Returns:
        What ``main`` returns.
    """
    try:
        return main(*args)
    except USER_ERRORS as e:
        rank = f"rank {comm.get_rank()}: " if comm.get_world_size() > 1 else ""
        print(f"error: {rank}{one_line(e)}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def one_line(error: BaseException) -> str:
    """The message of an error in one line; an ``OSError`` says its file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
