"""Weight files: found, read without running code that they may hold, and written whole or not at all."""

import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

__all__ = ["find_weights", "is_remote", "read_checkpoint", "read_weights", "write_aside"]

# What a zoo .pkl is made of: NumPy arrays in plain containers (codecs: how protocol 2 writes bytes).
_PICKLED_GLOBALS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


def find_weights(path: str, *, who: str) -> str:
    """The local file of a path or URL of weights, or a ``FileNotFoundError``; ``who`` is the model in messages."""
    path = re.sub(r"\?matching_heuristics=\w+$", "", path)  # a hint to Detectron2 main's checkpointer
    try:
        local = PathManager.get_local_path(path)
    except (OSError, ValueError, AssertionError) as e:
        hint = " Without a network connection, name a local file of them." * is_remote(path)
        raise FileNotFoundError(f"The weights of the {who} cannot be read: {path!r} ({e}).{hint}") from None
    if not os.path.isfile(local):
        raise FileNotFoundError(f"The weights of the {who} do not exist: {path!r}.")
    return local


def read_checkpoint(filename: str) -> dict[str, Any]:
    """
    Any weight file that Detectron2, torchvision or timm writes, as Detectron2's checkpointer expects it: ``model``
    (names to tensors or arrays), and what else a checkpoint holds. Only tensors, NumPy arrays and plain containers are
    read.

    Args:
        filename: a local file. The ending tells its format: ".pkl" (Detectron2's and Caffe2's zoos), ".pyth" (pycls),
            ".safetensors", and torch's own for any other.

    Raises:
        OSError: the file cannot be opened.
        ValueError: a damaged or foreign file, or one that would run code; one line that names the file.
    """
    try:
        if filename.endswith(".safetensors"):
            from safetensors.torch import load_file

            loaded = {"model": load_file(filename)}
        else:
            loaded = (_read_pickle if filename.endswith(".pkl") else _read_torch)(filename)
        _check_weights(loaded["model"])
    except Exception as e:  # damaged, foreign and hostile bytes raise anything in torch, pickle, zipfile and NumPy
        if isinstance(e, OSError) and e.filename:
            raise
        raise ValueError(_explain(filename, e)) from e
    return loaded


def read_weights(path: str, *, who: str) -> dict[str, Tensor]:
    """:func:`read_checkpoint`'s weights of a path or URL, in the file's order, without the prefix that DDP adds."""
    weights = read_checkpoint(find_weights(path, who=who))["model"]
    return {name.removeprefix("module."): torch.as_tensor(value) for name, value in weights.items()}


def _read_pickle(filename: str) -> dict:
    with open(filename, "rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            # Python makes room for all numbers up to that of an object.
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > os.path.getsize(filename):
                raise pickle.UnpicklingError(f"it numbers an object {argument}")
        file.seek(0)
        loaded = _RestrictedUnpickler(file, encoding="latin1").load()
    if "model" in loaded and "__author__" in loaded:
        return loaded
    # Caffe2's detectors have "blobs", its classifiers do not.
    blobs = {key: value for key, value in loaded.get("blobs", loaded).items() if not key.endswith("_momentum")}
    return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}


def _read_torch(filename: str) -> dict:
    if zipfile.is_zipfile(filename):
        with zipfile.ZipFile(filename) as archive:
            content = sum(item.file_size for item in archive.infolist())
        if content > os.path.getsize(filename):  # compressed or overlapping, which torch writes neither
            raise zipfile.BadZipFile(f"it unpacks to {content:,} bytes")
    loaded = torch.load(filename, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise TypeError(f"it holds a {type(loaded).__name__}, expected a dict of tensors")
    if filename.endswith(".pyth"):
        state = {key: value for key, value in loaded["model_state"].items() if not key.endswith("num_batches_tracked")}
        return {"model": state, "__author__": "pycls", "matching_heuristics": True}
    if "model" in loaded:
        return loaded
    nested = loaded.get("state_dict")  # of training checkpoints, timm's among them
    return {"model": nested if isinstance(nested, Mapping) else loaded}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _PICKLED_GLOBALS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def _check_weights(weights) -> None:
    """Refuse what Detectron2 would trip over: anything but a dict of names to dense tensors or arrays of numbers."""
    if not isinstance(weights, dict):
        raise TypeError(f"its weights are a {type(weights).__name__}, expected a dict of tensors")
    for name, value in weights.items():
        if not isinstance(name, str):
            raise TypeError(f"a weight is named {name!r}, expected a string")
        if torch.is_tensor(value):
            dense = value.layout == torch.strided and not value.is_meta and not value.is_quantized
        else:
            dense = isinstance(value, np.ndarray) and value.dtype.kind in "biufc"
        if not dense:
            raise TypeError(f"{name} is a {type(value).__name__}, expected a dense tensor or an array of numbers")


def _explain(filename: str, error: Exception) -> str:
    message = str(error)
    refused = re.search(r"(?:it holds|GLOBAL) ([\w.]+)", message)
    if isinstance(error, pickle.UnpicklingError) and refused:
        return (
            f"{filename} is refused: it holds {refused.group(1)}, and weights are tensors or NumPy arrays in plain "
            f"containers; loading anything else could run any command."
        )
    # torch explains at length how to load the file all the same.
    message = re.split("Check the documentation|In PyTorch 2.6", message.rpartition("WeightsUnpickler error:")[2])[0]
    reason = " ".join(message.split())[:200] or type(error).__name__
    return f"{filename} ({os.path.getsize(filename):,} bytes) is truncated or not a checkpoint: {reason}."


def is_remote(path: str) -> bool:
    """Whether a path is a URL, which only Detectron2's path manager can open."""
    return "://" in path


def write_aside(path: str, write: Callable[[BinaryIO], object]) -> None:
    """
    Write a file under another name, and give it its own when all of it is on disk. A URL is written in place. ``write``
    is called with the open file; an ``OSError`` names the path.
    """
    if is_remote(path):
        with PathManager.open(path, "wb") as file:
            write(file)
        return
    aside = f"{path}.tmp"
    _remove(aside)  # left by a run that was killed; or a link, which must not lead out of the folder
    try:
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as e:
        _remove(aside)
        cause = e
        while isinstance(cause, RuntimeError):  # raised by torch.save while it handles the file's own error
            cause = cause.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, path) from e
        raise
    os.replace(aside, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name outlives a power cut too
    finally:
        os.close(folder)


def _remove(path: str) -> None:
    if os.path.lexists(path):
        os.remove(path)
