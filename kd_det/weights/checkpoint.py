"""Checkpoints that survive a kill, run no code when they are read, and leave nothing random unnoticed."""

import logging
import os
import pickle
import pickletools
import re
import zipfile
from typing import List

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

__all__ = ["SafeCheckpointer", "StrictCheckpointer", "describe_keys", "find_weights", "load_strictly"]

logger = logging.getLogger(__name__)

# What a zoo .pkl is made of: NumPy arrays in plain containers (codecs: how protocol 2 writes bytes).
_PICKLED_GLOBALS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _PICKLED_GLOBALS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


class SafeCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, with the same files, that

    * writes a checkpoint aside and renames it, so that a kill at any moment leaves the previous one good, and moves
      ``last_checkpoint`` only then;
    * reads tensors, NumPy arrays and plain containers only: a file that would run code is refused.
    """

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        if "://" in self.save_dir:  # not a file system that renames
            super().save(name, **kwargs)
            return
        data = {"model": self.model.state_dict()}
        data.update({key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()})
        data.update(kwargs)
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        if os.path.basename(path) != basename:
            raise ValueError(f"A checkpoint's name must not name a folder: {name!r}.")
        self.logger.info(f"Saving checkpoint to {path}")
        _write_aside(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        _write_aside(
            os.path.join(self.save_dir, "last_checkpoint"), lambda file: file.write(last_filename_basename.encode())
        )

    def resume_or_load(self, path: str, *, resume: bool = True):
        """
        As Detectron2's.

        Raises:
            FileNotFoundError, ValueError: the checkpoint is missing, damaged or refused; of a run to resume, names
                the one before it.
        """
        if not (resume and self.has_checkpoint()):
            if path:
                find_weights(path, who="model")
            return super().resume_or_load(path, resume=False)
        latest = ""
        try:
            latest = self._latest_checkpoint()
            if not os.path.isfile(latest):
                raise FileNotFoundError(f"last_checkpoint names {latest}, which does not exist.")
            return self.load(latest)
        except (ValueError, OSError) as e:
            earlier = self._readable_checkpoint_before(latest)
            if earlier is None:
                raise ValueError(f"{e} There is no earlier checkpoint in {self.save_dir}.") from e
            raise ValueError(
                f"{e} The one before it is {earlier}: to resume from it, write its name into "
                f"{os.path.join(self.save_dir, 'last_checkpoint')}."
            ) from e

    def _latest_checkpoint(self) -> str:
        try:
            return self.get_checkpoint_file()
        except UnicodeDecodeError:
            raise ValueError(f"{os.path.join(self.save_dir, 'last_checkpoint')} does not hold a name.") from None

    def _readable_checkpoint_before(self, path: str):
        """The newest other checkpoint whose archive is whole, by name; None without one."""
        for candidate in sorted(self.get_all_checkpoint_files(), key=os.path.getmtime, reverse=True):
            if candidate != path and zipfile.is_zipfile(candidate):
                with zipfile.ZipFile(candidate) as archive:
                    if archive.testzip() is None:
                        return os.path.basename(candidate)
        return None

    def _load_file(self, filename: str):
        try:
            loaded = self._read(filename)
            _check_weights(loaded["model"])
        except _UNREADABLE as e:
            if isinstance(e, OSError) and e.filename:
                raise
            self._parsed_url_during_load = None  # main's load() wants to find it so when it is called again
            raise ValueError(_explain(filename, e)) from e
        return loaded

    def _read(self, filename: str):
        if filename.endswith(".safetensors"):  # timm's
            return {"model": _read_safetensors(filename)}
        if filename.endswith(".pkl"):
            # Detectron2 reads the file after this, so it meets what was just found to be harmless.
            with PathManager.open(filename, "rb") as file:
                _check_pickle_size(file, os.path.getsize(filename))
                _RestrictedUnpickler(file, encoding="latin1").load()
        elif filename.endswith(".pyth"):
            self._torch_load(filename)
        elif not hasattr(DetectionCheckpointer, "_torch_load"):  # v0.6
            loaded = self._torch_load(filename)
            return loaded if "model" in loaded else {"model": loaded}
        return super()._load_file(filename)

    def _torch_load(self, filename: str):
        _check_archive_size(filename)
        loaded = torch.load(filename, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise TypeError(f"it holds a {type(loaded).__name__}, expected a dict of tensors")
        return loaded


def _read_safetensors(filename: str) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(filename)
    except SafetensorError as e:
        raise ValueError(str(e)) from e


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


def _check_pickle_size(file, size: int) -> None:
    """Refuse a pickle that numbers an object beyond its own size: Python makes room for all numbers up to that."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > size:
            raise pickle.UnpicklingError(f"it numbers an object {argument}")
    file.seek(0)


def _check_archive_size(filename: str) -> None:
    """Refuse an archive whose files are larger than itself, compressed or overlapping; torch writes neither."""
    if zipfile.is_zipfile(filename):
        with zipfile.ZipFile(filename) as archive:
            content = sum(item.file_size for item in archive.infolist())
        if content > os.path.getsize(filename):
            raise zipfile.BadZipFile(f"it unpacks to {content:,} bytes")


# What reading damaged, foreign or hostile bytes raises, in torch, pickle and NumPy.
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OSError,  # without a file's name: a seek to where a truncated file has nothing
    OverflowError,
    RuntimeError,
    TypeError,
    UnicodeDecodeError,
    ValueError,
)


def _explain(filename: str, error: Exception) -> str:
    size = os.path.getsize(filename)
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
    return f"{filename} ({size:,} bytes) is truncated or not a checkpoint: {reason}."


def _write_aside(path: str, write) -> None:
    """
    Write a file under another name, and give it its own when all of it is on disk.

    Raises:
        OSError: names the file.
    """
    aside = f"{path}.tmp"
    try:
        if os.path.lexists(aside):
            os.remove(aside)  # of a run that was killed; or a link, which must not lead out of the folder
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as e:
        if os.path.lexists(aside):
            os.remove(aside)
        cause = e
        while isinstance(cause, RuntimeError):  # torch.save's, while it handles the file's own
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


def find_weights(path: str, *, who: str) -> str:
    """
    The local file of weights, fetched if they are a URL.

    Args:
        path: a file or URL that Detectron2's path manager knows.
        who: what messages call the model.

    Raises:
        FileNotFoundError: no such file.
    """
    path = re.sub(r"\?matching_heuristics=\w+$", "", path)  # a hint to Detectron2 main's checkpointer
    try:
        local = PathManager.get_local_path(path)
    except (OSError, ValueError, AssertionError) as e:
        raise FileNotFoundError(f"The weights of the {who} cannot be read: {path!r} ({e}).") from None
    if not os.path.isfile(local):
        raise FileNotFoundError(f"The weights of the {who} do not exist: {path!r}.")
    return local


# Keys of older checkpoints that today's models rebuild from their config or do without.
_REBUILT_KEYS = ("anchor_generator.cell_anchors", "num_batches_tracked")
_NORMALISATION_KEYS = ("pixel_mean", "pixel_std")


class StrictCheckpointer(SafeCheckpointer):
    """Collects what did not fit instead of logging it."""

    def _load_model(self, checkpoint):
        # Zoo checkpoints still carry the normalisation they were trained with; no model loads it any more.
        self.normalisation = {k: v for k, v in checkpoint["model"].items() if k in _NORMALISATION_KEYS}
        matching = logging.getLogger("detectron2.checkpoint.c2_model_loading")
        try:
            matching.addFilter(_is_error)  # it warns twice of every weight that does not fit
            self.incompatible = super()._load_model(checkpoint)
        finally:
            matching.removeFilter(_is_error)
        return None  # nothing left for the base class to log


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def load_strictly(model: nn.Module, path: str, *, who: str) -> None:
    """
    Load weights in any format that Detectron2 reads, and fail unless they are exactly the model's.

    Args:
        model: a plain model.
        path: a file or URL that Detectron2's path manager knows.
        who: what messages call the model, e.g. "teacher 'x.yaml'".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or refused file; or missing, unexpected or misshapen weights: lists the first keys of
            each kind.
    """
    find_weights(path, who=who)
    checkpointer = StrictCheckpointer(model, save_to_disk=False)
    checkpointer.load(path)
    found = checkpointer.incompatible
    unexpected = [
        key
        for key in found.unexpected_keys
        if key not in _NORMALISATION_KEYS and not any(rebuilt in key for rebuilt in _REBUILT_KEYS)
    ]
    misshapen = {key: f"{key} is {tuple(have)}, expected {tuple(want)}" for key, have, want in found.incorrect_shapes}
    missing = [key for key in found.missing_keys if key not in _NORMALISATION_KEYS and key not in misshapen]
    problems = describe_keys("missing", missing)
    problems += describe_keys("unexpected", unexpected)
    problems += describe_keys("misshapen", list(misshapen.values()))
    not_finite = [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]
    problems += describe_keys("not finite", not_finite)
    for key, trained_with in checkpointer.normalisation.items():
        trained_with = torch.as_tensor(trained_with).flatten().float()
        configured = getattr(model, key).flatten().float().cpu()
        if trained_with.shape != configured.shape or not torch.allclose(trained_with, configured, atol=1e-2):
            problems.append(f"trained with {key} {trained_with.tolist()}, configured {configured.tolist()}")
    if problems:
        raise ValueError(f"The weights {path!r} do not fit the {who}: {'; '.join(problems)}.")


def describe_keys(kind: str, items: List[str], most: int = 5) -> List[str]:
    """The first keys of a kind, e.g. "missing", with their number, as a list of one text; of none, an empty list."""
    if not items:
        return []
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return [f"{len(items)} {kind} ({', '.join(items[:most])}{more})"]
