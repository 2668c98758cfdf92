"""Whether weights fit a model: exactly, or well enough to start its backbone from them; and how misfits are worded."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_det.backbones import TimmBackbone
from kd_det.weights.checkpoint import SafeCheckpointer
from kd_det.weights.files import find_weights

__all__ = ["MisfitError", "check_initial_weights", "load_strictly", "misshapen", "refuse_misshapen"]

_NORMALISATION_KEYS = ("pixel_mean", "pixel_std")
# Keys of older checkpoints that today's models rebuild from their config or do without.
_IGNORED = re.compile(r"anchor_generator\.cell_anchors|num_batches_tracked|^pixel_(mean|std)$")

# The largest unfit share of a backbone's weights; deformable convolutions, which ImageNet weights lack, add up to a
# quarter to a ResNet's.
_MOST_UNFIT = 0.3

# A convolution of a residual stage, by the names that Detectron2 gives it.
_STAGE = re.compile(r"\b(res\d)\..*conv\d\.weight$")


class MisfitError(ValueError):
    """Weights that do not fit, found by a model that renames what it loads."""


def misshapen(name: str, found: Iterable[int], expected: Iterable[int]) -> str:
    return f"{name} is {tuple(found)}, expected {tuple(expected)}"


def refuse_misshapen(shapes: Iterable[tuple[str, torch.Size, torch.Size]], hint: str = "") -> None:
    """Raise :class:`MisfitError` if found and expected shapes of weights that a model renamed differ."""
    unfit = [misshapen(name, found, expected) for name, found, expected in shapes if found != expected]
    if unfit:
        raise MisfitError(_describe_misfits(misshapen=unfit) + hint)


def _describe_misfits(*, most: int = 5, **kinds: Sequence[str]) -> str:
    """The number and the first weights of each kind: "2 missing (a, b); 7 left over (c, d and 5 more)"."""
    texts = []
    for kind, items in kinds.items():
        more = f" and {len(items) - most} more" if len(items) > most else ""
        if items:
            texts.append(f"{len(items)} {kind.replace('_', ' ')} ({', '.join(items[:most])}{more})")
    return "; ".join(texts)


def load_strictly(model: nn.Module, path: str, *, who: str, read: Mapping[str, Tensor] | None = None) -> dict:
    """
    Load weights in any format that Detectron2 reads, and fail unless they are exactly the model's. Returns what else
    the file holds, such as its ``metadata``.

    Args:
        model: a plain model.
        path: a file or URL that Detectron2's path manager knows.
        who: what messages call the model, e.g. "teacher 'x.yaml'".
        read: the weights, where they were read already; the path is their name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or refused file; missing, unexpected, misshapen or infinite weights; names the first.
    """
    found, rest = _load(model, path, who, read)
    problems = [
        _describe_misfits(
            missing=[key for key in found.missing if key not in _NORMALISATION_KEYS],
            unexpected=[key for key in found.unexpected if not _IGNORED.search(key)],
            misshapen=list(found.misshapen.values()),
            not_finite=[key for key, value in model.state_dict().items() if not torch.isfinite(value).all()],
        )
    ]
    for key, trained_with in found.normalisation.items():
        trained_with = torch.as_tensor(trained_with).flatten().float()
        configured = getattr(model, key).flatten().float().cpu()
        if trained_with.shape != configured.shape or not torch.allclose(trained_with, configured, atol=1e-2):
            problems.append(f"trained with {key} {trained_with.tolist()}, configured {configured.tolist()}")
    if any(problems):
        raise ValueError(f"The weights {path!r} do not fit the {who}: {'; '.join(filter(None, problems))}.")
    return rest


def check_initial_weights(model: nn.Module, path: str, *, who: str) -> dict:
    """
    As :func:`load_strictly`, but refuses only weights of another network than the model's backbone. Detectron2 starts
    from what fits and warns of the rest.

    Raises:
        FileNotFoundError, ValueError: as there; or a file that lacks much of the backbone, has it in other shapes, or
            has more blocks in the backbone's stages.
    """
    found, rest = _load(model, path, who)
    names = [name for name, p in model.named_parameters() if name.startswith("backbone.") and p.dim() > 1]
    own = [name for name in names if name.startswith("backbone.bottom_up.")] or names
    stages = {match[1] for match in map(_STAGE.search, own) if match}
    problems = {
        "misshapen": [found.misshapen[key] for key in own if key in found.misshapen],
        "missing": [key for key in own if key in found.missing],
        "left_over": [key for key in found.unexpected if (m := _STAGE.search(key)) and m[1] in stages],
    }
    if sum(map(len, problems.values())) > _MOST_UNFIT * len(own):
        hint = "tools/convert_backbone.py converts those of torchvision and timm to Detectron2's format"
        if any(isinstance(module, TimmBackbone) for module in model.modules()):
            hint = (
                "timm's own weights of the backbone belong in MODEL.TIMM.WEIGHTS; tools/convert_backbone.py --for "
                "converts those of torchvision"
            )
        raise ValueError(
            f"The weights {path!r} are another network's than the backbone of the {who}, which has {len(own)}: "
            f"{_describe_misfits(most=1, **problems)}. ({hint}.)"
        )
    return rest


class _Collector(SafeCheckpointer):
    """Collects what does not fit instead of logging it."""

    def _load_model(self, checkpoint):
        # Zoo checkpoints still carry the normalisation they were trained with; no model loads it any more.
        self.normalisation = {k: v for k, v in checkpoint["model"].items() if k in _NORMALISATION_KEYS}
        given = {key: tuple(value.shape) for key, value in checkpoint["model"].items()}
        matching = logging.getLogger("detectron2.checkpoint.c2_model_loading")
        try:
            matching.addFilter(_is_error)  # it warns twice of every weight that does not fit
            found = super()._load_model(checkpoint)
        finally:
            matching.removeFilter(_is_error)
        self.misshapen = {key: misshapen(key, have, want) for key, have, want in found.incorrect_shapes}
        # Where Detectron2 matches by the ends of names (backbone files), other shapes are missing and left over to it.
        own, unfit = self.model.state_dict(), set()
        for key in found.missing_keys:
            name = max((name for name in given if f".{key}".endswith(f".{name}")), key=len, default=None)
            if name is not None and given[name] != own[key].shape:
                self.misshapen[key] = misshapen(key, given[name], own[key].shape)
                unfit.add(name)
        self.missing = [key for key in found.missing_keys if key not in self.misshapen]
        self.unexpected = [key for key in found.unexpected_keys if key not in unfit]
        return None  # nothing is left for the base class to log


def _load(model: nn.Module, path: str, who: str, read: Mapping[str, Tensor] | None = None) -> tuple[_Collector, dict]:
    checkpointer = _Collector(model, save_to_disk=False)
    try:
        if read is not None:
            checkpointer._load_model({"model": dict(read)})
            return checkpointer, {}
        find_weights(path, who=who)
        return checkpointer, checkpointer.load(path)
    except MisfitError as e:
        raise ValueError(f"The weights {path!r} do not fit the {who}: {e}.") from None


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
