"""
The data sets of the study: study_digits_{train,val} and study_trees_{train,val}, on which tables report, and parts of
their training images, study_..._tune_{train,val}, on which weights and schedules are chosen. Made by

    kd-det digits --output $DETECTRON2_DATASETS/study_digits --num-train 4000 --num-val 1500 --size 96 --light \\
        --num-crops 0 --num-val-crops 0
    python docs/trees/trees.py deepforest/data $DETECTRON2_DATASETS/study_trees 24
"""

import functools
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

ROOT = os.getenv("DETECTRON2_DATASETS", "datasets")
DIGITS = os.path.join(ROOT, "study_digits")
TREES = os.path.join(ROOT, "study_trees")


def last_fifth_of_digits(record: dict) -> bool:
    return record["image_id"] > 3200


def right_quarter_of_trees(record: dict) -> bool | None:
    """Whether a tile lies in the right quarter of the training photograph, None where it lies in both parts."""
    x = int(os.path.basename(record["file_name"])[5:9])
    return True if x >= 1872 else False if x + 144 <= 1872 else None


def register(name: str, json_files: str, images: str, is_val) -> None:
    for split in ("train", "val"):
        register_coco_instances(f"study_{name}_{split}", {}, json_files.format(split), images.format(split))
        tune = f"study_{name}_tune_{split}"
        load = functools.partial(load_part, json_files.format("train"), images.format("train"), tune, is_val)
        DatasetCatalog.register(tune, load)
        MetadataCatalog.get(tune).set(evaluator_type="coco")


def load_part(json_file: str, images: str, name: str, is_val) -> list[dict]:
    records = load_coco_json(json_file, images, name)  # which also tells the class names
    return [record for record in records if is_val(record) is name.endswith("val")]


register("digits", f"{DIGITS}/coco/instances_{{}}.json", f"{DIGITS}/JPEGImages", last_fifth_of_digits)
register("trees", f"{TREES}/{{}}.json", f"{TREES}/{{}}", right_quarter_of_trees)
