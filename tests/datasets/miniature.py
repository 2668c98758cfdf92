"""Miniature COCO and VOC data sets, on disk exactly as Detectron2's builtin names expect them."""

import json
from pathlib import Path

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES, COCO_PERSON_KEYPOINT_NAMES
from PIL import Image

# Of each image: its size (width, height) and objects, as (class, x0, y0, x1, y1) in pixels from 0, x1 and y1 outside.
IMAGES = [
    ((128, 96), [("person", 8, 8, 40, 88), ("dog", 60, 40, 120, 90)]),
    ((96, 128), [("dog", 10, 10, 50, 70), ("dog", 40, 80, 90, 120)]),
    ((128, 96), [("car", 16, 20, 100, 70)]),
    ((96, 96), [("person", 30, 4, 66, 92), ("car", 2, 60, 28, 90)]),
]


def write_image(path: Path, size, objects, seed: int):
    pixels = np.random.RandomState(seed).randint(60, size=(size[1], size[0], 3)).astype(np.uint8)
    colors = {"person": (220, 40, 40), "dog": (40, 220, 40), "car": (40, 40, 220)}
    for name, x0, y0, x1, y1 in objects:
        pixels[y0:y1, x0:x1] = colors[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_coco(root: Path) -> Path:
    """``coco_2017_train`` and ``_val`` with masks, and ``keypoints_coco_2017_*``, four images each."""
    ids = {category["name"]: category["id"] for category in COCO_CATEGORIES}
    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    person = {"id": 1, "name": "person", "keypoints": list(COCO_PERSON_KEYPOINT_NAMES), "skeleton": []}
    for split in ("train2017", "val2017"):
        images, annotations, people = [], [], []
        for i, (size, objects) in enumerate(IMAGES):
            name = f"{i + 1:012d}.jpg"
            write_image(root / "coco" / split / name, size, objects, seed=i)
            images.append({"id": i + 1, "file_name": name, "width": size[0], "height": size[1]})
            for label, x0, y0, x1, y1 in objects:
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": ids[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
                annotations.append(annotation)
                if label == "person":
                    keypoints = [x for k in range(17) for x in (x0 + 1 + k, y0 + 1 + 2 * k, 2)]
                    people.append({**annotation, "keypoints": keypoints, "num_keypoints": 17})
        folder = root / "coco" / "annotations"
        folder.mkdir(exist_ok=True)
        for kind, found, categories in (("instances", annotations, things), ("person_keypoints", people, [person])):
            content = {"images": images, "annotations": found, "categories": categories}
            (folder / f"{kind}_{split}.json").write_text(json.dumps(content))
    return root


def write_voc(root: Path) -> Path:
    """``voc_2007_trainval``, ``voc_2007_test`` and ``voc_2012_trainval``, each of the four images, under ``root``."""
    for year, splits in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        folder = root / f"VOC{year}"
        for part in ("Annotations", "ImageSets/Main"):
            (folder / part).mkdir(parents=True)
        for s, split in enumerate(splits):
            names = [f"{1000 * s + i:06d}" for i in range(len(IMAGES))]
            (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
            for i, (name, (size, objects)) in enumerate(zip(names, IMAGES)):
                write_image(folder / "JPEGImages" / f"{name}.jpg", size, objects, seed=i)
                write_voc_annotation(folder / "Annotations" / f"{name}.xml", size, [(*o, 0) for o in objects])
    return root


def write_voc_annotation(path: Path, size, objects):
    """Objects are (class, x0, y0, x1, y1, difficult); the file counts pixels from 1, both ends inside."""
    text = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult><bndbox>"
        f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1, difficult in objects
    )
    path.write_text(
        f"<annotation><filename>{path.stem}.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height>"
        f"<depth>3</depth></size>{text}</annotation>"
    )
