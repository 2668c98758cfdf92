"""Detectron2's training batches, each a function of the run's seed and its own number: a run resumes exactly."""

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data import build as detectron2_build
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kd_det.data import CheckedMapper, DatasetError
from kd_det.errors import one_line
from kd_det.random_state import preserved_random_state, seed_everything

__all__ = ["ResumableLoader", "build_train_loader"]


def build_train_loader(cfg: CfgNode, *, mapper: Callable | None = None, dataset=None) -> "ResumableLoader":
    """
    What Detectron2's ``build_detection_train_loader(cfg, mapper=..., dataset=...)`` loads, resumably: same data sets,
    sampler, batch size and grouping by aspect ratio.

    Args:
        cfg: with ``DATASETS.TRAIN``, ``DATALOADER`` and ``SOLVER.IMS_PER_BATCH``.
        mapper: from a dataset dict to the model's input; default: ``DatasetMapper(cfg, is_train=True)``.
        dataset: a list of dataset dicts, or an indexable data set; default: those of ``DATASETS.TRAIN``.
    """
    seed = comm.shared_random_seed()
    with preserved_random_state():
        parts = detectron2_build._train_loader_from_config(cfg, mapper=mapper, dataset=dataset)
    dataset = parts["dataset"]
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)

    batch_size, rest = divmod(parts["total_batch_size"], comm.get_world_size())
    if rest or batch_size < 1:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {parts['total_batch_size']} (images of all processes together) must be a multiple "
            f"of the number of processes, {comm.get_world_size()}."
        )

    def build_sampler():
        # Detectron2's samplers draw their seeds from NumPy.
        return detectron2_build._train_loader_from_config(cfg, mapper=parts["mapper"], dataset=dataset)["sampler"]

    return ResumableLoader(
        dataset,
        parts["mapper"],
        build_sampler,
        batch_size=batch_size,
        aspect_ratio_grouping=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
        seed=seed,
    )


class ResumableLoader:
    """
    An endless iterable of batches. Batch k holds the k-th group of images in the sampler's order, and what the mapper
    draws at random for an image depends on the seed and the image's place in that order alone: neither on the number
    of workers nor on what was drawn before.
    """

    def __init__(
        self,
        dataset,
        mapper: Callable,
        build_sampler: Callable,
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
            build_sampler: returns an iterable of this process' indices, seeded by NumPy's random state.
            batch_size: images in a batch of this process.
            aspect_ratio_grouping: no batch mixes landscape with portrait; the dicts then have "width" and "height".
            num_workers: processes that load, 0 for this one.
            seed: the same in all processes.
            options: of PyTorch's ``DataLoader``, such as ``prefetch_factor``.
        """
        self._images = _SeededImages(dataset, CheckedMapper(mapper), seed)
        self._build_sampler = build_sampler
        self._batch_size = batch_size
        self._wide = None
        if aspect_ratio_grouping:
            self._wide = np.array([_is_wide(dataset[i]) for i in range(len(dataset))])
        self._num_workers = num_workers
        self._options = options
        self._first = 0

    def state_dict(self) -> dict:
        """What the order of batches depends on."""
        return {"seed": self._images.seed, "batch_size": self._batch_size, "processes": comm.get_world_size()}

    def load_state_dict(self, state: dict) -> None:
        self._images.seed = state["seed"]

    def start_at(self, batch: int) -> None:
        """The next iteration over this loader begins with this batch."""
        self._first = batch

    def __iter__(self) -> Iterator[list[dict]]:
        # A generator: workers start with the first batch, when it is known which one that is.
        loader = DataLoader(
            self._images,
            batch_sampler=itertools.islice(self._batches(), self._first, None),
            num_workers=self._num_workers,
            collate_fn=_as_list,
            generator=torch.Generator().manual_seed(self._images.seed),  # leaves the global one alone
            **{**self._options, "worker_init_fn": _WorkerInit(self._options.get("worker_init_fn"))},
        )
        for batch in loader:
            for image in batch:
                if isinstance(image, DatasetError):
                    raise image
            yield batch

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Lists of an image's place in the order of all processes and its index in the data set."""
        with preserved_random_state():
            seed_everything(self._images.seed)
            sampler = self._build_sampler()
        places = itertools.count(comm.get_rank(), comm.get_world_size())
        groups: dict[bool, list] = {False: [], True: []}
        for place, index in zip(places, sampler, strict=False):
            wide = bool(self._wide[index]) if self._wide is not None else False
            groups[wide].append((place, index))
            if len(groups[wide]) == self._batch_size:
                yield groups[wide]
                groups[wide] = []


class _SeededImages(Dataset):
    def __init__(self, dataset, mapper: Callable, seed: int):
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place_and_index: tuple[int, int]):
        place, index = place_and_index
        if get_worker_info() is not None:
            try:
                return self._load(place, index)
            except DatasetError as e:
                return e  # raised by the loader: a worker would wrap it in its own traceback
        with preserved_random_state():
            return self._load(place, index)

    def _load(self, place: int, index: int) -> dict:
        seed_everything(self.seed, place)
        for _ in range(100):
            record = self.dataset[index]
            try:
                image = self.mapper(record)
            except DatasetError:
                raise
            except ValueError as e:
                raise DatasetError(f"image {record.get('file_name')} cannot be prepared: {one_line(e)}") from e
            if image is not None:
                return image
            index = random.randrange(len(self.dataset))  # a mapper's None means: take another, as in Detectron2
        raise DatasetError("the mapper rejected 100 images in a row")


class _WorkerInit:
    """
    A cluster's SIGTERM goes to all processes of a run, a terminal's SIGINT too; but the step that the trainer finishes
    may still wait for an image. So workers end when the trainer says so, and at no other's request.
    """

    def __init__(self, init: Callable | None):
        self._init = init

    def __call__(self, worker_id: int):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):  # says whose signal it is; macOS has none
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        if self._init is not None:
            self._init(worker_id)


def _end_with(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)  # as PyTorch's own handler


def _is_wide(record: dict) -> bool:
    if not {"width", "height"} <= set(record):
        raise DatasetError(
            f"{record.get('file_name', 'an image')}: no width and height, which DATALOADER.ASPECT_RATIO_GROUPING needs"
        )
    return record["width"] > record["height"]


def _as_list(batch: list) -> list:
    return batch
