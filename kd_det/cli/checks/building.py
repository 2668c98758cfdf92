"""One line for what Detectron2's builders raise."""

import contextlib

from kd_det.errors import IMPORT_HINT, UserError

__all__ = ["naming"]


@contextlib.contextmanager
def naming(what: str, *errors: type[Exception]):
    """Detectron2's builders raise all of these for a name or a number out of range; names what they built."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ZeroDivisionError, *errors) as e:
        hint = f" {IMPORT_HINT}" if "No object named" in str(e) else ""
        raise UserError(f"{what} cannot be built: {type(e).__name__}: {e}{hint}") from e
