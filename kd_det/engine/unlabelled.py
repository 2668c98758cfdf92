"""The data set without annotations of a run: its images and, from a file of COCO results, their pseudo-labels."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode

from kd_det.data import class_names
from kd_det.data.unlabelled import category_names, load_unlabelled, read_results, registered_unlabelled
from kd_det.errors import DatasetError, UserError, first_few
from kd_det.features.classes import match_classes
from kd_det.student import DISTILLER

__all__ = ["has_unlabelled", "unlabelled_batch_size", "unlabelled_dataset", "unlabelled_names"]

logger = logging.getLogger(__name__)


def has_unlabelled(cfg: CfgNode) -> bool:
    """Whether the batches of a config hold unlabelled images, which a plain student could not train on."""
    return cfg.MODEL.META_ARCHITECTURE == DISTILLER and cfg.KD.UNLABELLED.RATIO > 0


def unlabelled_names(cfg: CfgNode) -> list[str]:
    """The names of ``KD.UNLABELLED.DATASETS``, registered; a ``UserError`` for none."""
    names = registered_unlabelled(cfg.KD.UNLABELLED.DATASETS, "KD.UNLABELLED.DATASETS")
    if not names:
        raise UserError(
            f"KD.UNLABELLED.RATIO is {cfg.KD.UNLABELLED.RATIO:g} and KD.UNLABELLED.DATASETS is empty: name a data "
            f'set, or give a folder or a COCO json, such as [["mine", "photographs"]]'
        )
    return names


def unlabelled_batch_size(cfg: CfgNode, labelled: int) -> int:
    """The unlabelled images beside so many labelled ones; a ``UserError`` where that is no whole number."""
    ret = cfg.KD.UNLABELLED.RATIO * labelled
    if abs(ret - round(ret)) > 1e-6 or round(ret) < 1:
        raise UserError(
            f"KD.UNLABELLED.RATIO {cfg.KD.UNLABELLED.RATIO:g} with {labelled} labelled images a process makes {ret:g} "
            f"unlabelled ones; expected a whole number, at least 1"
        )
    return round(ret)


def unlabelled_dataset(cfg: CfgNode) -> list[dict]:
    """
    The dicts of the unlabelled images. With ``KD.UNLABELLED.RESULTS``, the detections above the threshold are their
    annotations, in the student's classes; images that the file does not name are left out: nobody has looked at them.

    Raises:
        UserError, DatasetError: data sets or results that cannot be used, results of other images or other classes.
    """
    node, names = cfg.KD.UNLABELLED, unlabelled_names(cfg)
    records = load_unlabelled(names)
    if not node.RESULTS:
        return records
    ids = [x.get("image_id") for x in records]
    if len(set(ids)) < len(ids):
        raise DatasetError(f"images of {', '.join(names)} share an id, and results find their image by it")
    needs = [key for key, on in (("segmentation", cfg.MODEL.MASK_ON), ("keypoints", cfg.MODEL.KEYPOINT_ON)) if on]
    found = read_results(node.RESULTS, _student_classes(cfg, names), threshold=node.THRESHOLD, needs=needs)
    ret = [{**x, "annotations": found[x["image_id"]]} for x in records if x.get("image_id") in found]
    if not ret:
        theirs, ours = (first_few([repr(i) for i in ids], 3) for ids in (found, ids))
        raise DatasetError(
            f"the results {node.RESULTS!r} are of other images than {', '.join(names)}: they have the image ids "
            f"{theirs}, the data sets {ours}"
        )
    left_out = len(records) - len(ret)
    boxes = sum(len(x["annotations"]) for x in ret)
    logger.info(
        f"Pseudo-labels: {boxes} boxes with a score of at least {node.THRESHOLD:g} in {len(ret)} images"
        + (f"; {left_out} others, which the results do not name, are left out." if left_out else ".")
    )
    return ret


def _student_classes(cfg: CfgNode, names: Sequence[str]) -> dict[int, int]:
    """
    The student's class of each category id of the results. The ids are those of the images' own file where it lists
    categories, else those of the training set.
    """
    mine = class_names(cfg.DATASETS.TRAIN)
    categories = next(filter(None, (category_names(name) for name in (*names, *cfg.DATASETS.TRAIN[:1]))), {})
    if not categories:
        raise DatasetError(
            f"the category ids of {cfg.KD.UNLABELLED.RESULTS!r} have no names: neither the unlabelled data sets nor "
            f"DATASETS.TRAIN list their classes"
        )
    ids = sorted(categories)
    try:
        match = match_classes(
            len(mine) or len(ids),
            len(ids),
            student_classes=mine,
            teacher_classes=[categories[i] for i in ids],
            class_map=cfg.KD.TEACHER.CLASS_MAP,
        )
    except ValueError as e:
        raise UserError(f"the categories of {cfg.KD.UNLABELLED.RESULTS!r}: {e}") from None
    classes = range(len(ids)) if match is None else match.to_student.tolist()
    return {category: i for category, i in zip(ids, classes) if i >= 0}
