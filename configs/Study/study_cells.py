"""
BCCD, photographs of blood through a microscope with boxes of its cells (Pascal VOC's format, MIT licence), as
study_cells_{train,val,test}: the splits that its authors made, of 205, 87 and 72 images. Fetched by

    git clone https://github.com/Shenggan/BCCD_Dataset $DETECTRON2_DATASETS/BCCD_Dataset
"""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_voc_instances

ROOT = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "BCCD_Dataset", "BCCD")
CLASS_NAMES = ["RBC", "WBC", "Platelets"]


def has_area(box: list[float]) -> bool:
    """Two boxes of the data set are a single pixel."""
    return box[2] > box[0] + 1 and box[3] > box[1] + 1


def load_split(split: str) -> list[dict]:
    records = load_voc_instances(ROOT, split, CLASS_NAMES)
    for record in records:
        record["annotations"] = [annotation for annotation in record["annotations"] if has_area(annotation["bbox"])]
    return records


for split in ("train", "val", "test"):
    name = f"study_cells_{split}"
    DatasetCatalog.register(name, lambda split=split: load_split(split))
    MetadataCatalog.get(name).set(thing_classes=CLASS_NAMES, evaluator_type="coco")
