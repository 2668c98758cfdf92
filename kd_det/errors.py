"""How kd_det words its errors: what was found, what was expected, the valid names."""

import difflib
from typing import Iterable

__all__ = ["DatasetError", "IMPORT_HINT", "USER_ERRORS", "UserError", "first_few", "one_line", "unknown_name"]


class UserError(ValueError):
    """What a user can cause and fix, said in one line."""


class DatasetError(ValueError):
    """A data set that is not registered, not there, or not readable, in one line for the user."""


# Added to messages about names that a project may have registered itself.
IMPORT_HINT = "(A project's own is found once its module is imported: --import MODULE, or KD.IMPORTS in the config.)"

# What a user can cause and fix. Anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, FloatingPointError, OSError)


def unknown_name(kind: str, name: str, valid: Iterable[str], most: int = 12) -> str:
    """
    One line for a name that does not exist: the nearest valid names, then as many others as fit.

    Args:
        kind: what the name should have named, e.g. "tap of the teacher".
        name: what was found.
        valid: every valid name.
        most: at most so many valid names are listed.
    """
    valid = [str(v) for v in valid]
    nearest = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
    rest = [v for v in valid if v not in nearest]
    shown = first_few(nearest + rest, most) or "none"
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return f"Unknown {kind} {name!r}. {hint}Valid names: {shown}."


def first_few(items: list[str], most: int = 5) -> str:
    """A list for a message: the first items, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def one_line(error: BaseException) -> str:
    """The message of an error in one line; an ``OSError`` names its file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
