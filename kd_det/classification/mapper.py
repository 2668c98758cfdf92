"""From files to images: torchvision's v2 transforms, and what happens to corrupt images."""

import functools
import logging
import multiprocessing
from collections.abc import Callable
from typing import Dict, List, Optional

from detectron2.config import CfgNode
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from kd_det.data.checks import DatasetError

__all__ = ["ClassificationMapper", "build_mapper", "build_transform", "readable"]

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
        steps.append(functools.partial(_reorder, indices=["RGB".index(channel) for channel in order]))
    return v2.Compose(steps)


def _reorder(image: Tensor, indices: List[int]) -> Tensor:
    return image[indices]


class ClassificationMapper:
    """
    From a dataset dict with ``file_name`` and ``label`` to the same with ``image``, as ``ImageClassifier`` takes it;
    None for a corrupt image to be skipped, for which Detectron2's and kd_det's training loaders take another.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], *, skip_corrupt: bool = False):
        """
        Args:
            transform: from an RGB picture to a tensor (3, H, W).
            skip_corrupt: skip images that cannot be read instead of raising.
        """
        self._transform = transform
        self._skip_corrupt = skip_corrupt
        self._skipped = multiprocessing.Value("q", 0)  # counts in all workers

    @property
    def skipped(self) -> int:
        """How often an image was skipped, in this process and its workers."""
        return self._skipped.value

    def __call__(self, dataset_dict: Dict) -> Optional[Dict]:
        """
        Raises:
            DatasetError: the image cannot be read, and is not to be skipped.
        """
        path = dataset_dict["file_name"]
        try:
            image = default_loader(path)
        except _UNREADABLE as e:
            problem = f"image {path} cannot be read ({' '.join(str(e).split())})"
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


def readable(batch: List[Optional[Dict]]) -> List[Dict]:
    """The images of a batch that were not skipped."""
    return [x for x in batch if x is not None]
