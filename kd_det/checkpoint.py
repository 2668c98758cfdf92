"""Loading weights so that nothing stays random unnoticed."""

import logging
from typing import List

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

__all__ = ["load_strictly"]

logger = logging.getLogger(__name__)


# Keys of older checkpoints that today's models rebuild from their config or do without.
_REBUILT_KEYS = ("anchor_generator.cell_anchors", "num_batches_tracked")
_NORMALISATION_KEYS = ("pixel_mean", "pixel_std")


class _StrictCheckpointer(DetectionCheckpointer):
    """Collects what did not fit instead of logging it."""

    def _load_model(self, checkpoint):
        # Zoo checkpoints still carry the normalisation they were trained with; no model loads it any more.
        self.normalisation = {k: v for k, v in checkpoint["model"].items() if k in _NORMALISATION_KEYS}
        self.incompatible = super()._load_model(checkpoint)
        return None  # nothing left for the base class to log


def load_strictly(model: nn.Module, path: str, *, who: str) -> None:
    """
    Load weights in any format that Detectron2 reads, and fail unless they are exactly the model's.

    Args:
        model: a plain model.
        path: a file or URL that Detectron2's path manager knows.
        who: what messages call the model, e.g. "teacher 'x.yaml'".

    Raises:
        FileNotFoundError: no such file.
        ValueError: missing, unexpected or misshapen weights; lists the first keys of each kind.
    """
    checkpointer = _StrictCheckpointer(model, save_to_disk=False)
    try:
        local = checkpointer.path_manager.get_local_path(path)
    except (OSError, ValueError, AssertionError) as e:
        raise FileNotFoundError(f"The weights of the {who} cannot be read: {path!r} ({e}).") from None
    if not checkpointer.path_manager.isfile(local):
        raise FileNotFoundError(f"The weights of the {who} do not exist: {path!r}.")
    checkpointer.load(path)
    found = checkpointer.incompatible
    unexpected = [
        key
        for key in found.unexpected_keys
        if key not in _NORMALISATION_KEYS and not any(rebuilt in key for rebuilt in _REBUILT_KEYS)
    ]
    problems = _describe("missing", [k for k in found.missing_keys if k not in _NORMALISATION_KEYS])
    problems += _describe("unexpected", unexpected)
    shapes = [f"{key} is {tuple(have)}, expected {tuple(want)}" for key, have, want in found.incorrect_shapes]
    problems += _describe("misshapen", shapes)
    for key, trained_with in checkpointer.normalisation.items():
        trained_with = torch.as_tensor(trained_with).flatten().float()
        configured = getattr(model, key).flatten().float().cpu()
        if trained_with.shape != configured.shape or not torch.allclose(trained_with, configured, atol=1e-2):
            problems.append(f"trained with {key} {trained_with.tolist()}, configured {configured.tolist()}")
    if problems:
        raise ValueError(f"The weights {path!r} do not fit the {who}: {'; '.join(problems)}.")


def _describe(kind: str, items: List[str], most: int = 5) -> List[str]:
    if not items:
        return []
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return [f"{len(items)} {kind} ({', '.join(items[:most])}{more})"]
