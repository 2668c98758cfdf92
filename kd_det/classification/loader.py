"""From data sets to batches: mixup and cutmix, data loaders."""

import functools
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from kd_det.classification.data import load_dataset, load_images
from kd_det.classification.mapper import ClassificationMapper, build_mapper
from kd_det.engine.loader import ResumableLoader, images_per_process
from kd_det.random_state import preserved_random_state, seed_everything
from kd_det.student import student_class

__all__ = ["MixingLoader", "build_test_loader", "build_train_loader"]


class MixingLoader(ResumableLoader):
    """
    A loader whose batches went through mixup or cutmix before anything else sees them, so that student and teacher get
    the same mixed images. Labels become distributions over the classes. What is drawn depends on the loader's seed and
    the batch's number alone, which a ``collate_fn`` does not know.
    """

    def __init__(self, *args, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0, **kwargs):
        """
        Args:
            args, kwargs: see :class:`kd_det.engine.ResumableLoader`.
            num_classes: K.
            mixup, cutmix: alpha of each, 0: off; with both on, each batch takes one of them.
        """
        super().__init__(*args, **kwargs)
        mixes = [v2.MixUp(num_classes=num_classes, alpha=mixup)] if mixup else []
        mixes += [v2.CutMix(num_classes=num_classes, alpha=cutmix)] if cutmix else []
        self._mix = v2.RandomChoice(mixes)

    def __iter__(self) -> Iterator[list[dict]]:
        for number, batch in enumerate(super().__iter__(), self.first):
            images = torch.stack([x["image"] for x in batch]).float()
            labels = torch.tensor([x.get("label", 0) for x in batch])  # without labels, only the images matter
            with preserved_random_state():
                # Images are seeded by (seed, place); three numbers keep clear of those.
                seed_everything(self.state_dict()["seed"], number, comm.get_rank())
                images, labels = self._mix(images, labels)
            yield [{**x, "image": image, "label": label} for x, image, label in zip(batch, images, labels)]


def build_train_loader(cfg: CfgNode, mapper: ClassificationMapper | None = None) -> ResumableLoader:
    """
    Endless batches of ``SOLVER.IMS_PER_BATCH`` images over all processes, from ``DATASETS.TRAIN``, with labels where
    the student needs them; the mapper is by default :func:`build_mapper`'s.

    Raises:
        ValueError: a data set that cannot be used, or a wrong value of a config key.
    """
    loader, aug = ResumableLoader, cfg.CLASSIFICATION.AUG
    if aug.MIXUP or aug.CUTMIX:
        mixing = {"num_classes": cfg.CLASSIFICATION.NUM_CLASSES, "mixup": aug.MIXUP, "cutmix": aug.CUTMIX}
        loader = functools.partial(MixingLoader, **mixing)
    load = load_dataset if student_class(cfg).needs_labels else load_images
    images = DatasetFromList(load(cfg.DATASETS.TRAIN), copy=False)
    return loader(
        images,
        mapper or build_mapper(cfg, is_train=True),
        functools.partial(TrainingSampler, len(images)),  # seeded by the loader
        batch_size=images_per_process(cfg),
        aspect_ratio_grouping=False,
        seed=comm.shared_random_seed(),
        **_workers(cfg),
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """
    Every image of a data set once, of ``PROBE.TRAIN`` at most ``PROBE.MAX_IMAGES``, over all processes; corrupt ones
    are left out, where they are to be skipped.
    """
    dicts, probe = load_dataset([dataset_name]), cfg.CLASSIFICATION.PROBE
    if dataset_name == probe.TRAIN:
        dicts = dicts[:: -(-len(dicts) // probe.MAX_IMAGES)]
    dicts = DatasetFromList(dicts, copy=False)
    return DataLoader(
        dicts,
        batch_size=cfg.CLASSIFICATION.TEST_BATCH_SIZE,
        sampler=InferenceSampler(len(dicts)),
        collate_fn=functools.partial(_map_readable, mapper=build_mapper(cfg, is_train=False)),
        persistent_workers=cfg.DATALOADER.NUM_WORKERS > 0 and cfg.CLASSIFICATION.PERSISTENT_WORKERS,
        **_workers(cfg),
    )


def _map_readable(batch: list[dict], mapper: ClassificationMapper) -> list[dict]:
    # Not Detectron2's MapDataset, which takes another image for one that is skipped.
    return [x for x in map(mapper, batch) if x is not None]


def _workers(cfg: CfgNode) -> dict:
    num_workers = cfg.DATALOADER.NUM_WORKERS
    prefetch = {"prefetch_factor": cfg.CLASSIFICATION.PREFETCH_FACTOR} if num_workers else {}
    return {"num_workers": num_workers, "pin_memory": torch.cuda.is_available(), **prefetch}
