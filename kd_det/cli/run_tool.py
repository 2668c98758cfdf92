"""How tools end: with one line for what a user can fix, with a traceback only for a defect."""

import sys
from collections.abc import Callable

from detectron2.utils import comm

from kd_det.errors import USER_ERRORS, one_line

__all__ = ["run_tool"]


def run_tool(main: Callable, *args):
    """
    Call ``main(*args)``; an error that a user can fix becomes one line on stderr and exit status 1.

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
