"""
The offline data set on disk: one set of JPEG files, annotated twice, and digit crops from the same split.

.. code-block:: none

    dataset.json                     the options it was made with, and how much it holds
    JPEGImages/train_000000.jpg ...  all images, of both splits
    coco/instances_{train,val}.json  COCO, with masks (run lengths, which keep the holes of an 8: INPUT.MASK_FORMAT
                                     "bitmask") and DIGIT_KEYPOINTS; annotations also hold "digit_id", the row in
                                     load_digits(), and images "photo", their background: name, x0, y0, side
    Annotations/*.xml                Pascal VOC: boxes 1-based and inclusive; no object is "difficult"
    ImageSets/Main/{train,val}.txt
    classification/{train,val}/{0..9}/*.jpg   ImageFolder
"""

import json
import logging
import os
import shutil
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass

import cv2
import numpy as np
from pycocotools import mask as run_lengths
from tqdm import tqdm

from kd_det.data.checks import DatasetError
from kd_det.quickstart.digits import extreme_points, render_crop, render_scene
from kd_det.quickstart.register import DIGIT_CLASSES, DIGIT_KEYPOINTS, SPLITS, coco_json

__all__ = ["OfflineDatasetOptions", "make_offline_dataset"]

VERSION = 2  # of the files' content; to be raised when the same options no longer give the same files
MANIFEST = "dataset.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OfflineDatasetOptions:
    """
    The files are a function of these alone. Sizes are sides of square pictures in pixels; ``num_crops`` and
    ``num_val_crops`` count the pictures for classification (0: none). ``light``: see :func:`render_scene`.
    """

    num_train: int = 1500
    num_val: int = 500
    size: int = 160
    num_crops: int = 4000
    num_val_crops: int = 1000
    crop_size: int = 64
    seed: int = 0
    light: bool = False

    def __post_init__(self):
        # Detectron2's VOC loader cannot read a list of one image. Crops: one per class at least, or none.
        least = {"num_train": 2, "num_val": 2, "size": 64, "crop_size": 32, "seed": 0}
        for name in ("num_crops", "num_val_crops"):
            least[name] = len(DIGIT_CLASSES) if getattr(self, name) else 0
        for name, value in least.items():
            if getattr(self, name) < value:
                raise DatasetError(f"{name}: expected {value} or more, found {getattr(self, name)}")


def make_offline_dataset(output, options, *, overwrite=False):
    """
    Write the data set to the folder ``output``, all of it or nothing: it is written beside it, then renamed. One that
    an older version made with the same options is replaced, and the log says so.

    Returns:
        bool: True if it was written, False if a complete one with the same options was there already.

    Raises:
        DatasetError: ``output`` holds something that this tool did not make, or that it made otherwise and
            ``overwrite`` is False.
    """
    output = os.path.abspath(output)
    if os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        found = _read_manifest(output)
        problem = _mismatch(output, found, options)
        is_older = found["version"] < VERSION
        if problem is None and not is_older and not overwrite:
            return False
        if problem is not None and not overwrite:
            raise DatasetError(f"{output}: {problem}; make it anew with --overwrite or choose another --output")
        if is_older:
            logger.info("%s: version %s of these files, made anew in version %s", output, found["version"], VERSION)
    os.makedirs(os.path.dirname(output), exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=f".{os.path.basename(output)}.", dir=os.path.dirname(output))
    try:
        new = os.path.join(scratch, "new")
        _write(new, options)
        if os.path.exists(output):
            os.rename(output, os.path.join(scratch, "old"))
        os.rename(new, output)
    finally:
        shutil.rmtree(scratch)
    return True


def _read_manifest(output):
    try:
        with open(os.path.join(output, MANIFEST)) as f:
            found = json.load(f)
        return {"version": int(found["version"]), **{key: found[key] for key in ("options", "files", "bytes")}}
    except (OSError, ValueError, TypeError, KeyError):
        problem = f"{output} exists and is not a data set made by this tool; choose another --output"
        raise DatasetError(problem) from None


def _mismatch(output, found, options):
    """In what a data set differs from one of these options, besides an older version; None: in nothing."""
    if found["version"] > VERSION:
        return f"made by a newer version of this tool ({found['version']}, this one is {VERSION})"
    wanted = asdict(options)
    different = [k for k in wanted if found["options"].get(k) != wanted[k]]
    if different:
        changes = ", ".join(f"{k} {found['options'].get(k)} (asked for: {wanted[k]})" for k in different)
        return f"made with other options: {changes}"
    files, size = _content(output)
    if (files, size) != (found["files"], found["bytes"]):
        return f"damaged, {files} files of {size} bytes; expected {found['files']} of {found['bytes']} bytes"
    return None


def _content(output):
    paths = [os.path.join(folder, f) for folder, _, files in os.walk(output) for f in files if f != MANIFEST]
    return len(paths), sum(os.path.getsize(path) for path in paths)


def _write(root, options):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main", "coco"):
        os.makedirs(os.path.join(root, folder))
    scenes = {"train": options.num_train, "val": options.num_val}
    crops = {"train": options.num_crops, "val": options.num_val_crops}
    for split in SPLITS:
        logger.info("%s: %d images, %d crops", split, scenes[split], crops[split])
        _write_scenes(root, split, scenes[split], options)
        _write_crops(root, split, crops[split], options)
    files, size = _content(root)
    with open(os.path.join(root, MANIFEST), "w") as f:
        json.dump({"version": VERSION, "options": asdict(options), "files": files, "bytes": size}, f)


def _write_scenes(root, split, count, options):
    images, annotations = [], []
    categories = [{"id": i + 1, "name": n, "keypoints": DIGIT_KEYPOINTS} for i, n in enumerate(DIGIT_CLASSES)]
    for index in tqdm(range(count), f"{split} images", unit="image", disable=None):
        name = f"{split}_{index:06d}"
        picture = render_scene(split, index, size=options.size, seed=options.seed, light=options.light)
        _write_image(os.path.join(root, "JPEGImages", name + ".jpg"), picture.image)
        ET.ElementTree(_voc_xml(name, picture)).write(os.path.join(root, "Annotations", name + ".xml"))
        image = {"id": index + 1, "file_name": name + ".jpg", "photo": picture.photo}
        image["height"], image["width"] = picture.image.shape[:2]
        images.append(image)
        for i, (x0, y0, x1, y1) in enumerate(picture.boxes.tolist()):
            mask, keypoints = picture.visible[i], extreme_points(picture.visible[i])
            rle = run_lengths.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": categories[picture.labels[i]]["id"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {**rle, "counts": rle["counts"].decode()},
                    "keypoints": [value for x, y in keypoints for value in (x, y, 2)],  # 2: labelled and visible
                    "num_keypoints": len(keypoints),
                    "digit_id": picture.digit_ids[i],
                }
            )
    with open(os.path.join(root, "ImageSets", "Main", split + ".txt"), "w") as f:
        f.writelines(f"{split}_{index:06d}\n" for index in range(count))
    with open(coco_json(root, split), "w") as f:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, f)


def _write_crops(root, split, count, options):
    folders = [os.path.join(root, "classification", split, name) for name in DIGIT_CLASSES]
    for folder in folders if count else ():
        os.makedirs(folder)
    for index in tqdm(range(count), f"{split} crops", unit="image", disable=None):
        picture = render_crop(split, index, size=options.crop_size, seed=options.seed, light=options.light)
        _write_image(os.path.join(folders[picture.labels[0]], f"{index:06d}.jpg"), picture.image)


def _voc_xml(name, picture):
    """As VOC2012's own files, whose boxes are 1-based and inclusive: x0, x1 become x0 + 1, x1."""
    root = ET.Element("annotation")
    height, width, depth = picture.image.shape
    _fill(root, {"folder": "JPEGImages", "filename": name + ".jpg", "segmented": 0})
    _fill(ET.SubElement(root, "size"), {"width": width, "height": height, "depth": depth})
    for i, (x0, y0, x1, y1) in enumerate(picture.boxes.tolist()):
        item = ET.SubElement(root, "object")
        _fill(item, {"name": DIGIT_CLASSES[picture.labels[i]], "pose": "Unspecified"})
        _fill(item, {"truncated": int(picture.truncated[i]), "difficult": 0})
        _fill(ET.SubElement(item, "bndbox"), {"xmin": x0 + 1, "ymin": y0 + 1, "xmax": x1, "ymax": y1})
    ET.indent(root)
    return root


def _fill(element, values):
    for key, value in values.items():
        ET.SubElement(element, key).text = str(value)


def _write_image(path, image):
    _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    with open(path, "wb") as f:  # not imwrite, which does not report a full disk
        f.write(jpeg)
