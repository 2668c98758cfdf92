"""From files to images: torchvision's v2 transforms, and what happens to corrupt images."""

import logging
import multiprocessing
import operator
from collections.abc import Callable
from typing import Dict, Optional

from detectron2.config import CfgNode
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from kd_det.errors import DatasetError, one_line

__all__ = ["ClassificationMapper", "build_mapper", "build_transform"]

logger = logging.getLogger(__name__)

# What Pillow raises for files that are no image, cut off, broken (PNG: SyntaxError, ValueError) or absurdly large.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def build_transform(cfg: CfgNode, is_train: bool) -> Callable[[Image.Image], Tensor]:
    """
    From an RGB picture to a uint8 tensor (3, side, side) whose channels are in the order of ``INPUT.FORMAT``.

    Raises:
        ValueError: a format that is no order of R, G and B, or a number that a transform does not take.
    """
    aug, order = cfg.CLASSIFICATION.AUG, cfg.INPUT.FORMAT
    if sorted(order) != ["B", "G", "R"]:
        raise ValueError(f"INPUT.FORMAT must be RGB or BGR for classification, found {order!r}.")
    if is_train:
        steps = [v2.RandomResizedCrop(aug.TRAIN_SIZE, scale=tuple(aug.SCALE), ratio=tuple(aug.RATIO), antialias=True)]
        if aug.FLIP:
            steps.append(v2.RandomHorizontalFlip(aug.FLIP))
        if any(aug.COLOR_JITTER):
            steps.append(v2.ColorJitter(*aug.COLOR_JITTER))
        if aug.RAND_AUGMENT_OPS:
            steps.append(v2.RandAugment(aug.RAND_AUGMENT_OPS, aug.RAND_AUGMENT_MAGNITUDE))
    else:
        steps = [v2.Resize(aug.TEST_RESIZE, antialias=True), v2.CenterCrop(aug.TEST_SIZE)]
    steps.append(v2.PILToTensor())
    if order != "RGB":
        # As image[indices], in a form that worker processes can unpickle.
        steps.append(operator.itemgetter(["RGB".index(channel) for channel in order]))
    return v2.Compose(steps)


class ClassificationMapper:
    """
    From a dataset dict with ``file_name`` and ``label`` to the same with ``image``, as ``ImageClassifier`` takes it;
    None for a corrupt image with ``skip_corrupt``, for which Detectron2's and kd_det's training loaders take another;
    without, a :class:`DatasetError`.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], *, skip_corrupt: bool = False):
        self._transform, self._skip_corrupt = transform, skip_corrupt
        self._skipped = multiprocessing.Value("q", 0)  # counts in all workers

    @property
    def skipped(self) -> int:
        """How often an image was skipped, in this process and its workers."""
        return self._skipped.value

    def __call__(self, dataset_dict: Dict) -> Optional[Dict]:
        path = dataset_dict["file_name"]
        try:
            image = default_loader(path)
        except _UNREADABLE as e:
            problem = f"image {path} cannot be read ({one_line(e)})"
            if not self._skip_corrupt:
                raise DatasetError(f"{problem}; CLASSIFICATION.CORRUPT_IMAGES 'skip' leaves such images out") from e
            with self._skipped.get_lock():
                self._skipped.value += 1
                logger.warning(f"skipped: {problem}; {self._skipped.value} so far")
            return None
        return {**dataset_dict, "image": self._transform(image)}


def build_mapper(cfg: CfgNode, is_train: bool) -> ClassificationMapper:
    """
    Raises:
        ValueError: ``CLASSIFICATION.CORRUPT_IMAGES`` is neither "stop" nor "skip"; or see :func:`build_transform`.
    """
    found = cfg.CLASSIFICATION.CORRUPT_IMAGES
    if found not in ("stop", "skip"):
        raise ValueError(f"CLASSIFICATION.CORRUPT_IMAGES must be 'stop' or 'skip', found {found!r}.")
    return ClassificationMapper(build_transform(cfg, is_train), skip_corrupt=found == "skip")
