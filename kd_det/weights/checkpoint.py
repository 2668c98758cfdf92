"""Detectron2's checkpointer, with checkpoints that survive a kill and run no code when they are read."""

import os
import zipfile
from collections.abc import Callable

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from kd_det.errors import UserError
from kd_det.weights.files import find_weights, is_remote, read_checkpoint, write_aside

__all__ = ["SafeCheckpointer"]


class SafeCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, with the same files, that

    * writes a checkpoint aside and renames it, so that a kill at any moment leaves the previous one good, and moves
      ``last_checkpoint`` only then;
    * reads tensors, NumPy arrays and plain containers only: a file that would run code is refused;
    * raises on every process where a file is missing on one, so that no process waits for another.
    """

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        if os.path.basename(path) != basename:
            raise ValueError(f"A checkpoint's name must not name a folder: {name!r}.")
        others = {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **others, **kwargs}
        self.logger.info(f"Saving checkpoint to {path}")
        write_aside(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_aside(path, lambda file: file.write(last_filename_basename.encode()))

    def resume_or_load(self, path: str, *, resume: bool = True):
        """
        As Detectron2's.

        Raises:
            FileNotFoundError, ValueError: the checkpoint is missing, damaged or refused; where a run was to resume,
                the message names the checkpoint before it.
        """
        found = comm.all_gather(resume and self.has_checkpoint())
        if not any(found):
            if path:
                _on_every_process(lambda: find_weights(path, who="model"))
            return super().resume_or_load(path, resume=False)
        if not all(found):
            lacking = [rank for rank, has_one in enumerate(found) if not has_one]
            raise FileNotFoundError(
                f"OUTPUT_DIR {self.save_dir} holds a checkpoint, but not on the machines of the processes {lacking}: "
                f"to resume, every machine needs it."
            )
        last, latest = os.path.join(self.save_dir, "last_checkpoint"), ""
        try:
            try:
                latest = self.get_checkpoint_file()
            except UnicodeDecodeError:
                raise ValueError(f"{last} does not hold a name.") from None
            _on_every_process(lambda: self._check_exists(latest))
            return self.load(latest)
        except UserError:  # the checkpoint is good, and of another run than this one
            raise
        except (ValueError, OSError) as e:
            earlier = self._readable_checkpoint_before(latest)
            hint = f"The one before it is {earlier}: to resume from it, write its name into {last}."
            raise ValueError(f"{e} {hint if earlier else f'There is no earlier checkpoint in {self.save_dir}.'}") from e

    def _check_exists(self, checkpoint: str) -> None:
        if not self.path_manager.isfile(checkpoint):
            raise FileNotFoundError(f"last_checkpoint names {checkpoint}, which does not exist.")

    def _readable_checkpoint_before(self, path: str) -> str | None:
        """The name of the newest other checkpoint whose archive is whole; None without one."""
        age = None if is_remote(self.save_dir) else os.path.getmtime  # a store has no dates, but names are in order
        for candidate in sorted(self.get_all_checkpoint_files(), key=age, reverse=True):
            local = self.path_manager.get_local_path(candidate)
            if candidate.endswith(("model_best.pth", "model_ema.pth")):  # plain students: nothing to resume from
                continue
            if candidate != path and zipfile.is_zipfile(local):
                with zipfile.ZipFile(local) as archive:
                    if archive.testzip() is None:
                        return os.path.basename(candidate)
        return None

    def _load_file(self, filename: str) -> dict:
        # Detectron2 main cuts "?matching_heuristics=True" from the name, and keeps it here while it loads.
        query = getattr(getattr(self, "_parsed_url_during_load", None), "query", "")
        self._parsed_url_during_load = None  # main's load() expects this when it is called again after an error
        loaded = read_checkpoint(filename)
        return {**loaded, "matching_heuristics": True} if query == "matching_heuristics=True" else loaded


def _on_every_process(check: Callable[[], object]) -> None:
    """Raise on every process what the check raises on one of them."""
    problem = None
    try:
        check()
    except (OSError, ValueError) as e:
        problem = e
    for other in [problem, *comm.all_gather(problem)]:
        if other is not None:
            raise other
