"""From files to batches: torchvision's v2 transforms, corrupt images, mixup and cutmix, data loaders."""

import functools
import logging
import multiprocessing
from typing import Callable, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import worker_init_reset_seed
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.utils import comm
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from kd_det.classification.data import load_dataset
from kd_det.data.checks import DatasetError

__all__ = [
    "ClassificationDataset",
    "MixImages",
    "build_test_loader",
    "build_train_loader",
    "build_transform",
    "first_training_batches",
]

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


class ClassificationDataset(Dataset):
    """
    Images as ``ImageClassifier`` takes them: ``{"image", "label", "file_name"}``. Of a corrupt image to be skipped, the
    next readable one of the list takes the place (training), or there is None (evaluation).
    """

    def __init__(
        self,
        dicts: Sequence[Dict],
        transform: Callable[[Image.Image], Tensor],
        *,
        skip_corrupt: bool = False,
        replace: bool = False,
    ):
        """
        Args:
            dicts: with ``file_name`` and ``label``.
            transform: from an RGB picture to a tensor (3, H, W).
            skip_corrupt: skip images that cannot be read instead of raising.
            replace: another image takes a skipped one's place.
        """
        self._dicts = DatasetFromList(list(dicts), copy=False)
        self._transform = transform
        self._skip_corrupt = skip_corrupt
        self._replace = replace
        self._skipped = multiprocessing.Value("q", 0)  # counts in all workers

    @property
    def skipped(self) -> int:
        """How often an image was skipped, in this process and its workers."""
        return self._skipped.value

    def __len__(self) -> int:
        return len(self._dicts)

    def __getitem__(self, index: int) -> Optional[Dict]:
        for attempt in range(len(self)):
            item = self._dicts[(index + attempt) % len(self)]
            try:
                image = default_loader(item["file_name"])
            except _UNREADABLE as e:
                problem = f"image {item['file_name']} cannot be read ({' '.join(str(e).split())})"
                if not self._skip_corrupt:
                    raise DatasetError(f"{problem}; CLASSIFICATION.CORRUPT_IMAGES 'skip' goes on without") from e
            else:
                return {**item, "image": self._transform(image)}
            with self._skipped.get_lock():
                self._skipped.value += 1
                logger.warning(f"skipped: {problem}; {self._skipped.value} so far")
            if not self._replace:
                return None
        raise DatasetError(f"none of the {len(self)} images can be read")


class MixImages:
    """
    A collate function: mixup or cutmix over the batch, before anything else sees it, so that student and teacher get
    the same mixed images. Labels become distributions over the classes.
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0):
        """
        Args:
            num_classes: K.
            mixup, cutmix: alpha of each, 0: off, not both; with both on, each batch takes one of them.
        """
        mixes = [v2.MixUp(num_classes=num_classes, alpha=mixup)] if mixup else []
        mixes += [v2.CutMix(num_classes=num_classes, alpha=cutmix)] if cutmix else []
        self._mix = v2.RandomChoice(mixes)

    def __call__(self, batch: List[Dict]) -> List[Dict]:
        images = torch.stack([x["image"] for x in batch]).float()
        images, labels = self._mix(images, torch.tensor([x["label"] for x in batch]))
        return [{**x, "image": image, "label": label} for x, image, label in zip(batch, images, labels)]


def _readable(batch: List[Optional[Dict]]) -> List[Dict]:
    return [x for x in batch if x is not None]


def build_train_loader(cfg: CfgNode) -> DataLoader:
    """
    Endless batches of ``SOLVER.IMS_PER_BATCH`` images over all processes, from ``DATASETS.TRAIN``.

    Raises:
        ValueError: a data set that cannot be used, or a wrong value of a config key.
    """
    node = cfg.CLASSIFICATION
    images = ClassificationDataset(
        load_dataset(cfg.DATASETS.TRAIN), build_transform(cfg, True), skip_corrupt=_skips(cfg), replace=True
    )
    mixes = node.AUG.MIXUP or node.AUG.CUTMIX
    collate = MixImages(node.NUM_CLASSES, mixup=node.AUG.MIXUP, cutmix=node.AUG.CUTMIX) if mixes else list
    return DataLoader(
        images,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        sampler=TrainingSampler(len(images)),
        drop_last=True,
        collate_fn=collate,
        worker_init_fn=worker_init_reset_seed,
        **_workers(cfg),
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Every image of a data set once, over all processes."""
    images = ClassificationDataset(
        load_dataset([dataset_name]), build_transform(cfg, False), skip_corrupt=_skips(cfg)
    )
    return DataLoader(
        images,
        batch_size=cfg.CLASSIFICATION.TEST_BATCH_SIZE,
        sampler=InferenceSampler(len(images)),
        collate_fn=_readable,
        **_workers(cfg),
    )


def first_training_batches(cfg: CfgNode, num_images: int, batch_size: int = 16):
    """This rank's share of an even sample of ``DATASETS.TRAIN``, transformed as in evaluation: no random number."""
    dicts = load_dataset(cfg.DATASETS.TRAIN)
    # Folders hold one class after the other: the first images would be of one class.
    sample = dicts[:: max(len(dicts) // num_images, 1)][:num_images]
    per_rank = max(len(sample) // comm.get_world_size(), 1)
    share = [sample[(i * comm.get_world_size() + comm.get_rank()) % len(sample)] for i in range(per_rank)]
    images = ClassificationDataset(share, build_transform(cfg, False), skip_corrupt=_skips(cfg), replace=True)
    for start in range(0, len(images), batch_size):
        yield [images[i] for i in range(start, min(start + batch_size, len(images)))]


def _skips(cfg: CfgNode) -> bool:
    found = cfg.CLASSIFICATION.CORRUPT_IMAGES
    if found not in ("stop", "skip"):
        raise ValueError(f"CLASSIFICATION.CORRUPT_IMAGES must be 'stop' or 'skip', found {found!r}.")
    return found == "skip"


def _workers(cfg: CfgNode) -> Dict:
    num_workers = cfg.DATALOADER.NUM_WORKERS
    if num_workers == 0:
        return {"num_workers": 0}
    return {
        "num_workers": num_workers,
        "prefetch_factor": cfg.CLASSIFICATION.PREFETCH_FACTOR,
        "persistent_workers": cfg.CLASSIFICATION.PERSISTENT_WORKERS,
        "pin_memory": torch.cuda.is_available(),
    }
