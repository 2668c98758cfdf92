"""
Tree crowns in aerial photographs as a COCO data set. The PyPI package deepforest (MIT licence) ships the photographs.

    python docs/trees/trees.py deepforest/data datasets/trees

cuts them into tiles; as a module (``--import docs/trees/trees.py``) it registers ``trees_train`` and ``trees_val``.
"""

import json
import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
from detectron2.data.datasets import register_coco_instances

# One photograph trains and the other evaluates: neighbouring tiles of one photograph look too much alike.
PHOTOS = {"train": "2019_YELL_2_528000_4978000_image_crop2", "val": "2019_YELL_2_541000_4977000_image_crop"}
STEPS = {"train": 72, "val": 144}  # training tiles overlap by half
SIDE = 144


def read_boxes(path: Path) -> list[list[float]]:
    """The boxes of a Pascal VOC file, as x0, y0, x1, y1."""
    objects = ET.parse(path).getroot().iter("bndbox")
    return [[float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")] for box in objects]


def crop(box: list[float], x: int, y: int) -> list[float] | None:
    """The part of a box that a tile shows, as COCO's x, y, width, height; None for less than half of the box."""
    x0, x1 = (min(max(v - x, 0), SIDE) for v in box[0::2])
    y0, y1 = (min(max(v - y, 0), SIDE) for v in box[1::2])
    whole = (box[2] - box[0]) * (box[3] - box[1])
    return [x0, y0, x1 - x0, y1 - y0] if (x1 - x0) * (y1 - y0) >= whole / 2 > 0 else None


def write_tiles(source: Path, output: Path, split: str) -> None:
    photo = cv2.imread(str(source / f"{PHOTOS[split]}.png"))
    boxes = read_boxes(source / f"{PHOTOS[split]}.xml")
    images, annotations = [], []
    (output / split).mkdir(parents=True, exist_ok=True)
    for y in range(0, photo.shape[0] - SIDE + 1, STEPS[split]):
        for x in range(0, photo.shape[1] - SIDE + 1, STEPS[split]):
            name = f"{y:04d}_{x:04d}.png"
            cv2.imwrite(str(output / split / name), photo[y : y + SIDE, x : x + SIDE])
            images.append({"id": len(images) + 1, "file_name": name, "height": SIDE, "width": SIDE})
            for bbox in filter(None, (crop(box, x, y) for box in boxes)):
                tree = {"bbox": bbox, "area": bbox[2] * bbox[3], "category_id": 1, "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, "image_id": len(images), **tree})
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
    (output / f"{split}.json").write_text(json.dumps(coco))
    print(f"{split}: {len(images)} tiles, {len(annotations)} trees")


if __name__ == "__main__":
    for split in PHOTOS:
        write_tiles(Path(sys.argv[1]), Path(sys.argv[2]), split)
else:
    root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "trees")
    for split in PHOTOS:
        register_coco_instances(f"trees_{split}", {}, f"{root}/{split}.json", f"{root}/{split}")
