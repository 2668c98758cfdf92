"""What differs between versions of PyTorch and Detectron2: the oldest PyTorch, and v0.6 against upstream main."""

import importlib
import importlib.util
import os
import sys
import types

import torch
from detectron2.utils.events import get_event_storage

__all__ = ["OLDEST_TORCH", "has_event_storage", "model_zoo"]

# Before it, torch.load(weights_only=True) could be made to run code (CVE-2025-32434), and get_total_norm is missing.
OLDEST_TORCH = (2, 6)

if torch.__version__ < OLDEST_TORCH:
    raise ImportError(f"kd_det needs PyTorch {'.'.join(map(str, OLDEST_TORCH))} or newer, found {torch.__version__}.")


def has_event_storage() -> bool:
    """Whether the caller runs inside an ``EventStorage``; main has a function for it, v0.6 has not."""
    try:
        get_event_storage()
    except AssertionError:
        return False
    return True


def _import_model_zoo() -> types.ModuleType:
    """
    ``detectron2.model_zoo``. It imports pkg_resources, which setuptools 82 dropped, for the path of a file. Where that
    is missing, a stand-in with this one function is there during the import, and removed afterwards.
    """
    missing = importlib.util.find_spec("pkg_resources") is None
    if missing:
        stand_in = types.ModuleType("pkg_resources")
        stand_in.resource_filename = lambda package, path: os.path.join(
            os.path.dirname(importlib.import_module(package).__file__), path
        )
        sys.modules["pkg_resources"] = stand_in
    try:
        from detectron2 import model_zoo
    finally:
        if missing:
            del sys.modules["pkg_resources"]
    return model_zoo


model_zoo = _import_model_zoo()
