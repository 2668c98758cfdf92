"""Checks of the numbers in ``CLASSIFICATION.*``."""

import math
from numbers import Real

from detectron2.config import CfgNode

from kd_det.classification.mapper import build_mapper

__all__ = ["check_input"]

# The least and the most that each key may be.
_RANGES = {
    **dict.fromkeys(("TEST_BATCH_SIZE", "PREFETCH_FACTOR"), (1, math.inf)),
    **dict.fromkeys(("AUG.TRAIN_SIZE", "AUG.TEST_RESIZE", "AUG.TEST_SIZE"), (1, math.inf)),
    **dict.fromkeys(("INPUT_SIZE", "AUG.RAND_AUGMENT_OPS", "AUG.MIXUP", "AUG.CUTMIX"), (0, math.inf)),
    "EMA_DECAY": (0, math.nextafter(1, 0)),  # 1 would average nothing
    "AUG.FLIP": (0, 1),
    "AUG.RAND_AUGMENT_MAGNITUDE": (0, 30),
}


def check_input(cfg: CfgNode) -> None:
    """Raise a ``ValueError`` for a number out of its range or an unknown word in what turns files into batches."""
    node = cfg.CLASSIFICATION
    for key, (least, most) in _RANGES.items():
        value = node.AUG[key.removeprefix("AUG.")] if key.startswith("AUG.") else node[key]
        if not least <= value <= most:
            expected = f"at least {least}" if most == math.inf else f"in {least} to {most}"
            raise ValueError(f"CLASSIFICATION.{key} must be {expected}, found {value}.")
    for key in ("SCALE", "RATIO"):
        value = node.AUG[key]
        if not _numbers(value, 2) or not 0 < value[0] <= value[1]:
            raise ValueError(f"CLASSIFICATION.AUG.{key} must be two positive numbers in order, found {value}.")
    jitter = node.AUG.COLOR_JITTER
    if not _numbers(jitter, 4) or min(jitter) < 0 or jitter[3] > 0.5:
        raise ValueError(
            f"CLASSIFICATION.AUG.COLOR_JITTER must be four numbers (brightness, contrast, saturation and hue), none "
            f"negative, the hue at most 0.5, found {jitter}."
        )
    build_mapper(cfg, is_train=True)


def _numbers(value, count: int) -> bool:
    return len(value) == count and all(isinstance(x, Real) and math.isfinite(x) for x in value)
