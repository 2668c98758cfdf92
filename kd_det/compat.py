"""What differs between Detectron2 v0.6 and upstream main."""

from detectron2.utils.events import get_event_storage

__all__ = ["has_event_storage"]


def has_event_storage() -> bool:
    """Whether the caller runs inside an ``EventStorage`` (v0.6 cannot be asked, main can)."""
    try:
        get_event_storage()
    except AssertionError:
        return False
    return True
