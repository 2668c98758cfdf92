"""
The data of the study: study_digits_{train,val}, on which tables report, and two parts of its training images,
study_digits_tune_{train,val}, on which weights and schedules are chosen. Made by

    kd-det digits --output $DETECTRON2_DATASETS/study_digits --num-train 4000 --num-val 1500 --size 96 --light \\
        --num-crops 0 --num-val-crops 0
"""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

ROOT = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "study_digits")
IMAGES = f"{ROOT}/JPEGImages"
FIRST_OF_VAL = 3201  # the id of the first training image on which weights are chosen


def load_part(name: str) -> list[dict]:
    records = load_coco_json(f"{ROOT}/coco/instances_train.json", IMAGES, name)  # which also tells the class names
    return [record for record in records if (record["image_id"] >= FIRST_OF_VAL) == name.endswith("val")]


for split in ("train", "val"):
    register_coco_instances(f"study_digits_{split}", {}, f"{ROOT}/coco/instances_{split}.json", IMAGES)
    name = f"study_digits_tune_{split}"
    DatasetCatalog.register(name, lambda name=name: load_part(name))
    MetadataCatalog.get(name).set(evaluator_type="coco")
