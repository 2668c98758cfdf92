"""Detectron2's training batches, each a function of the run's seed and its own number: a run resumes exactly."""

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Dataset, Sampler, get_worker_info

from kd_det.data import CheckedMapper, DatasetError
from kd_det.engine.unlabelled import has_unlabelled, unlabelled_batch_size, unlabelled_dataset
from kd_det.errors import UserError, one_line
from kd_det.features.unlabelled import UNLABELLED
from kd_det.random_state import preserved_random_state, seed_everything

__all__ = ["MixedLoader", "ResumableLoader", "build_train_loader", "images_per_process"]


def build_train_loader(
    cfg: CfgNode, *, mapper: Callable | None = None, dataset=None
) -> "ResumableLoader | MixedLoader":
    """
    What Detectron2's ``build_detection_train_loader(cfg, mapper=..., dataset=...)`` loads, resumably: same data sets,
    sampler, batch size and grouping by aspect ratio. With ``KD.UNLABELLED``, each batch has unlabelled images besides.

    Args:
        mapper: from a dataset dict to the model's input; default: ``DatasetMapper(cfg, is_train=True)``. It also maps
            unlabelled images, whose dicts have "annotations" only where these come from a file of results.
        dataset: a list of dataset dicts, or an indexable data set; default: those of ``DATASETS.TRAIN``.
    """
    batch_size = images_per_process(cfg)
    if dataset is None:
        dataset = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)

    def build_sampler() -> Sampler:
        loader = build_detection_train_loader(cfg, mapper=lambda record: record, dataset=dataset)
        if isinstance(loader, AspectRatioGroupedDataset):
            loader = loader.dataset
        return loader.dataset.sampler

    options = {
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "seed": comm.shared_random_seed(),
    }
    train_mapper = DatasetMapper(cfg, is_train=True) if mapper is None else mapper
    labelled = ResumableLoader(dataset, train_mapper, build_sampler, batch_size=batch_size, **options)
    if not has_unlabelled(cfg):
        return labelled
    images = DatasetFromList(unlabelled_dataset(cfg), copy=False)
    unlabelled = ResumableLoader(
        images,
        _unlabelled_mapper(cfg) if mapper is None else mapper,
        lambda: TrainingSampler(len(images)),
        batch_size=unlabelled_batch_size(cfg, batch_size),
        **options,
    )
    return MixedLoader(labelled, unlabelled)


def _unlabelled_mapper(cfg: CfgNode) -> DatasetMapper:
    """That of the labelled images, but for masks: results have bitmaps where the annotations may be polygons."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MASK_FORMAT = "bitmask"
    return DatasetMapper(cfg, is_train=True)


def images_per_process(cfg: CfgNode) -> int:
    """``SOLVER.IMS_PER_BATCH`` divided among the processes; ``UserError`` if it is not a multiple of their number."""
    ret, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
    if rest or ret < 1:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} (images of all processes together) must be a multiple "
            f"of the number of processes, {comm.get_world_size()}."
        )
    return ret


class ResumableLoader:
    """
    An endless iterable of batches, loaded by Detectron2's ``build_detection_train_loader``. Batch k holds the k-th
    group of images in the sampler's order, and what the mapper draws at random for an image depends on the seed and
    the image's place in that order alone: neither on the number of workers nor on what was drawn before.
    """

    def __init__(
        self,
        dataset,
        mapper: Callable,
        build_sampler: Callable[[], Sampler],
        *,
        batch_size: int,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        **options,
    ):
        """
        Args:
            dataset: an indexable data set of dataset dicts.
            mapper: from a dataset dict to the model's input; None where it has none.
            build_sampler: returns an endless sampler of this process' indices, seeded by NumPy's random state as
                Detectron2's samplers are.
            batch_size: images in a batch of this process.
            aspect_ratio_grouping: no batch mixes landscape with portrait; the dicts then have "width" and "height".
            num_workers: processes that load, 0 for this one.
            seed: the same in all processes.
            options: attributes of PyTorch's ``DataLoader``: ``prefetch_factor``, ``pin_memory``.
        """
        self.first = 0
        self._seed = seed
        self._dataset = dataset
        self._mapper = CheckedMapper(mapper)
        self._build_sampler = build_sampler
        self._batch_size = batch_size
        self._wide = [aspect_ratio_grouping and _is_wide(dataset[i]) for i in range(len(dataset))]
        self._num_workers = num_workers
        self._options = options

    def state_dict(self) -> dict:
        """What the order of batches depends on."""
        return {"seed": self._seed, "batch_size": self._batch_size, "processes": comm.get_world_size()}

    def load_state_dict(self, state: dict) -> None:
        self._seed = state["seed"]

    def start_at(self, batch: int) -> None:
        """The next iteration over this loader begins with this batch."""
        self.first = batch

    def __iter__(self) -> Iterator[list[dict]]:
        # This is a generator, so workers start when the first batch is requested: only then is its number known.
        with preserved_random_state():  # PyTorch draws a seed for its workers
            seed_everything(self._seed)
            sampler = _ResumableSampler(self._build_sampler(), self._wide, self._batch_size, self.first)
            images = _SeededImages(self._dataset, self._mapper, self._seed)
            loader = build_detection_train_loader(
                ToIterableDataset(images, sampler, shard_sampler=False),
                mapper=None,
                total_batch_size=self._batch_size * comm.get_world_size(),
                aspect_ratio_grouping=False,  # the sampler has grouped them
                num_workers=self._num_workers,
            )
            loader.worker_init_fn = _outlive_signals
            for name, value in self._options.items():
                setattr(loader, name, value)
            batches = iter(loader)
        for batch in batches:
            for image in batch:
                if isinstance(image, DatasetError):
                    raise image
            yield batch


class MixedLoader:
    """An endless iterable of batches of two loaders together; the images of the second are marked as unlabelled."""

    def __init__(self, labelled: ResumableLoader, unlabelled: ResumableLoader):
        self.labelled, self._unlabelled = labelled, unlabelled
        self.load_state_dict(self.state_dict())

    def state_dict(self) -> dict:
        """See :meth:`ResumableLoader.state_dict`."""
        return {**self.labelled.state_dict(), "unlabelled_batch_size": self._unlabelled.state_dict()["batch_size"]}

    def load_state_dict(self, state: dict) -> None:
        self.labelled.load_state_dict(state)
        # With equal seeds, the k-th images of both would be augmented alike.
        self._unlabelled.load_state_dict({**state, "seed": (state["seed"] + 1) % 2**31})

    def start_at(self, batch: int) -> None:
        """The next iteration over this loader begins with this batch."""
        self.labelled.start_at(batch)
        self._unlabelled.start_at(batch)

    def __iter__(self) -> Iterator[list[dict]]:
        for labelled, unlabelled in zip(self.labelled, self._unlabelled):
            yield labelled + [{**x, UNLABELLED: True} for x in unlabelled]


class _ResumableSampler(Sampler):
    """
    A sampler's order from the batch ``first`` on, grouped by aspect ratio: every ``batch_size`` items in a row are a
    batch. In a worker of a ``DataLoader``, the items of the batches that this worker loads. Yields (place, index): an
    image's place in the order of all processes, and its index in the data set.
    """

    def __init__(self, sampler: Sampler, wide: list[bool], batch_size: int, first: int):
        self._sampler = sampler
        self._wide = wide
        self._batch_size = batch_size
        self._first = first
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        batches = itertools.islice(self._batches(), self._first + turn, None, turns)
        return itertools.chain.from_iterable(batches)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        groups: dict[bool, list] = {False: [], True: []}
        for place, index in zip(itertools.count(self._rank, self._world_size), self._sampler, strict=False):
            group = groups[self._wide[index]]
            group.append((place, index))
            if len(group) == self._batch_size:
                yield group.copy()
                group.clear()


class _SeededImages(Dataset):
    def __init__(self, dataset, mapper: Callable, seed: int):
        self._dataset = dataset
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, place_and_index: tuple[int, int]):
        if get_worker_info() is not None:
            try:
                return self._load(*place_and_index)
            except DatasetError as e:
                return e  # raised by the loader: a worker would wrap it in its own traceback
        with preserved_random_state():
            return self._load(*place_and_index)

    def _load(self, place: int, index: int) -> dict:
        seed_everything(self._seed, place)
        for _ in range(100):
            record = self._dataset[index]
            try:
                image = self._mapper(record)
            except DatasetError:
                raise
            except ValueError as e:
                raise DatasetError(f"image {record.get('file_name')} cannot be prepared: {one_line(e)}") from e
            if image is not None:
                return image
            index = random.randrange(len(self._dataset))  # a mapper's None means: take another, as in Detectron2
        raise DatasetError("the mapper rejected 100 images in a row")


def _outlive_signals(worker_id: int) -> None:
    """
    A cluster's SIGTERM goes to all processes of a run, a terminal's SIGINT too; but the step that the trainer finishes
    may still wait for an image. So a worker ends when the trainer's process sends SIGTERM, and at no other's request.
    """
    trainer = os.getppid()

    def end_with_trainer():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            pass
        os._exit(0)  # as PyTorch's own handler

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it tells who sent the signal; macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_trainer, daemon=True).start()


def _is_wide(record: dict) -> bool:
    if not {"width", "height"} <= set(record):
        raise DatasetError(
            f"{record.get('file_name', 'an image')}: no width and height, which DATALOADER.ASPECT_RATIO_GROUPING needs"
        )
    return record["width"] > record["height"]
