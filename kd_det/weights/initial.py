"""Whether the weights that training starts from are of the model's own backbone."""

import re

from torch import nn

from kd_det.weights.checkpoint import StrictCheckpointer, describe_keys, find_weights

__all__ = ["check_initial_weights"]

# Of a backbone's weights; deformable convolutions, which ImageNet weights lack, add up to a quarter to a ResNet's.
_MOST_UNFIT = 0.3

# A convolution of a residual stage, by the names that Detectron2 gives it.
_STAGE = re.compile(r"\b(res\d)\..*conv\d\.weight$")


def check_initial_weights(model: nn.Module, path: str, *, who: str) -> None:
    """
    Refuse weights of another network than the model's backbone. Detectron2 starts from what fits and warns of the rest.

    Args:
        model: a plain model with a ``backbone``; it loads the weights.
        path: a file or URL that Detectron2's path manager knows.
        who: what messages call the model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or refused file, or one that lacks much of the backbone, has it in other shapes, or has
            more blocks in the backbone's stages.
    """
    find_weights(path, who=who)
    checkpointer = StrictCheckpointer(model, save_to_disk=False)
    checkpointer.load(path)
    found = checkpointer.incompatible
    names = [name for name, p in model.named_parameters() if name.startswith("backbone.") and p.dim() > 1]
    own = [name for name in names if name.startswith("backbone.bottom_up.")] or names
    misshapen = {key: f"{key} is {tuple(have)}, expected {tuple(want)}" for key, have, want in found.incorrect_shapes}
    stages = {match[1] for match in map(_STAGE.search, own) if match}
    problems = {
        "misshapen": [misshapen[key] for key in own if key in misshapen],
        "missing": [key for key in own if key in found.missing_keys and key not in misshapen],
        "left over": [key for key in found.unexpected_keys if (m := _STAGE.search(key)) and m[1] in stages],
    }
    if sum(map(len, problems.values())) > _MOST_UNFIT * len(own):
        described = "; ".join(text for kind, items in problems.items() for text in describe_keys(kind, items, most=1))
        raise ValueError(
            f"The weights {path!r} are another network's than the backbone of the {who}, which has {len(own)}: "
            f"{described}. (tools/convert_backbone.py brings those of torchvision and timm into Detectron2's format.)"
        )
