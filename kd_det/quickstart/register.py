"""The digits in Detectron2's catalogs. Nothing is registered on import, and files are read when a set is first used."""

import os
import shlex

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc

__all__ = ["DIGIT_CLASSES", "DIGIT_KEYPOINTS", "SPLITS", "coco_json", "register_builtin", "register_digits"]

DIGIT_CLASSES = tuple("0123456789")
DIGIT_KEYPOINTS = ("top", "bottom", "left", "right")  # the outermost points of what is visible of a digit
SPLITS = ("train", "val")


def coco_json(root, split):
    """The COCO annotation file of a split; the rest, with COCO's images, is laid out as VOC's development kit."""
    return os.path.join(root, "coco", f"instances_{split}.json")


def register_digits(root, prefix="digits"):
    """
    Register the data set that tools/make_offline_dataset.py writes to ``root`` as ``{prefix}_coco_{split}`` and
    ``{prefix}_voc_{split}``. ``make_command`` is what :func:`check_dataset` names where files are missing.
    """
    make_command = f"python tools/make_offline_dataset.py --output {shlex.quote(root)}"
    for split in SPLITS:
        coco, voc = f"{prefix}_coco_{split}", f"{prefix}_voc_{split}"
        metadata = {"thing_classes": list(DIGIT_CLASSES), "make_command": make_command}
        metadata.update(keypoint_names=list(DIGIT_KEYPOINTS), keypoint_flip_map=[("left", "right")])
        register_coco_instances(coco, metadata, coco_json(root, split), os.path.join(root, "JPEGImages"))
        # year: 2012 is how the evaluator names the area under the whole curve, 2007 the mean of 11 points.
        register_pascal_voc(voc, root, split, 2012, DIGIT_CLASSES)
        MetadataCatalog.get(voc).set(evaluator_type="pascal_voc", make_command=make_command)


def register_builtin() -> None:
    """Register the data set in ``$DETECTRON2_DATASETS/digits``, "datasets/digits" by default, if its names are free."""
    if "digits_coco_train" not in DatasetCatalog:
        register_digits(os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "digits"))
