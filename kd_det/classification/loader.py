"""From data sets to batches: mixup and cutmix, data loaders."""

import functools
from collections.abc import Iterator
from typing import Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kd_det.classification.data import load_dataset
from kd_det.classification.mapper import ClassificationMapper, build_mapper, readable
from kd_det.engine.loader import ResumableLoader, images_per_process
from kd_det.random_state import preserved_random_state, seed_everything

__all__ = ["MixedBatches", "build_test_loader", "build_train_loader"]


class MixedBatches:
    """
    The batches of a :class:`kd_det.engine.ResumableLoader` after mixup or cutmix: before anything else sees them, so
    that student and teacher get the same mixed images. Labels become distributions over the classes. What is drawn
    depends on the loader's seed and the batch's number alone.
    """

    def __init__(self, loader, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0):
        """
        Args:
            loader: a ResumableLoader.
            num_classes: K.
            mixup, cutmix: alpha of each, 0: off; with both on, each batch takes one of them.
        """
        self._loader = loader
        mixes = [v2.MixUp(num_classes=num_classes, alpha=mixup)] if mixup else []
        mixes += [v2.CutMix(num_classes=num_classes, alpha=cutmix)] if cutmix else []
        self._mix = v2.RandomChoice(mixes)
        self._first = 0

    def state_dict(self) -> Dict:
        return self._loader.state_dict()

    def load_state_dict(self, state: Dict) -> None:
        self._loader.load_state_dict(state)

    def start_at(self, batch: int) -> None:
        self._first = batch
        self._loader.start_at(batch)

    def __iter__(self) -> Iterator[List[Dict]]:
        for number, batch in enumerate(self._loader, self._first):
            images = torch.stack([x["image"] for x in batch]).float()
            labels = torch.tensor([x["label"] for x in batch])
            with preserved_random_state():
                # The loader seeds each image by (seed, place); three numbers give other random states.
                seed_everything(self.state_dict()["seed"], number, comm.get_rank())
                images, labels = self._mix(images, labels)
            yield [{**x, "image": image, "label": label} for x, image, label in zip(batch, images, labels)]


def build_train_loader(cfg: CfgNode, mapper: Optional[ClassificationMapper] = None) -> ResumableLoader | MixedBatches:
    """
    Endless batches of ``SOLVER.IMS_PER_BATCH`` images over all processes, from ``DATASETS.TRAIN``.

    Args:
        cfg: with ``DATASETS``, ``DATALOADER`` and ``CLASSIFICATION``.
        mapper: default: :func:`build_mapper` for training.

    Raises:
        ValueError: a data set that cannot be used, or a wrong value of a config key.
    """
    node = cfg.CLASSIFICATION
    images = DatasetFromList(load_dataset(cfg.DATASETS.TRAIN), copy=False)
    options = _workers(cfg)
    options.pop("persistent_workers", None)  # one endless iteration keeps its workers anyway
    loader = ResumableLoader(
        images,
        mapper or build_mapper(cfg, is_train=True),
        functools.partial(TrainingSampler, len(images)),  # seeded by the loader
        batch_size=images_per_process(cfg),
        aspect_ratio_grouping=False,
        seed=comm.shared_random_seed(),
        **options,
    )
    if node.AUG.MIXUP or node.AUG.CUTMIX:
        return MixedBatches(loader, node.NUM_CLASSES, mixup=node.AUG.MIXUP, cutmix=node.AUG.CUTMIX)
    return loader


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Every image of a data set once, over all processes."""
    dicts = DatasetFromList(load_dataset([dataset_name]), copy=False)
    return DataLoader(
        _Mapped(dicts, build_mapper(cfg, is_train=False)),
        batch_size=cfg.CLASSIFICATION.TEST_BATCH_SIZE,
        sampler=InferenceSampler(len(dicts)),
        collate_fn=readable,
        **_workers(cfg),
    )


class _Mapped(Dataset):
    """Detectron2's MapDataset takes another image for None, which must not happen in evaluation."""

    def __init__(self, dicts, mapper):
        self._dicts, self._mapper = dicts, mapper

    def __len__(self) -> int:
        return len(self._dicts)

    def __getitem__(self, index: int) -> Optional[Dict]:
        return self._mapper(self._dicts[index])


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
