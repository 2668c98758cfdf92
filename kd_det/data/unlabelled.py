"""Images without annotations in Detectron2's catalog, and what any detector found in them (a file of COCO results)."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from kd_det.errors import DatasetError, first_few, one_line, unknown_name

__all__ = ["category_names", "load_unlabelled", "read_results", "register_unlabelled", "registered_unlabelled"]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Exif's orientation; from 5 on, Detectron2 reads the image with its sides exchanged.
_ORIENTATION, _FIRST_TURNED = 274, 5


def register_unlabelled(name: str, source: str, root: str | None = None) -> None:
    """
    Register images without annotations, which are read when first used: a list of ``{"file_name", "image_id"}``, with
    "width" and "height" from a COCO json. Its categories, if it has any, become the metadata's classes.

    Args:
        source: a folder, of which all images at any depth are taken; a COCO json, of which "images" is read; or a text
            file with a path a line.
        root: where the paths in a file begin; default: its folder.
    """
    DatasetCatalog.register(name, lambda: _find_images(name, source, root))
    MetadataCatalog.get(name).set(source=(source,) if root is None else (source, root))


def registered_unlabelled(entries: Sequence, key: str) -> list[str]:
    """
    The names of the data sets of ``entries``: names, or [name, source] and [name, source, root] lists, which are
    registered (:func:`register_unlabelled`); again with the same source is no error.

    Raises:
        ValueError: another entry, or a name that is taken; ``key`` is the config's in the message.
    """
    names = []
    for entry in entries:
        if isinstance(entry, str):
            names.append(entry)
            continue
        is_list = isinstance(entry, (list, tuple)) and all(isinstance(x, str) for x in entry)
        if not is_list or len(entry) not in (2, 3):
            raise ValueError(
                f"{key} holds names of data sets, or [name, folder] or [name, file] pairs, found {entry!r}."
            )
        name, *source = entry
        if name not in DatasetCatalog:
            register_unlabelled(name, *source)
        elif MetadataCatalog.get(name).get("source") != tuple(source):
            raise ValueError(f"{key}: the data set name {name!r} is taken.")
        names.append(name)
    return names


def load_unlabelled(names: Sequence[str]) -> list[dict]:
    """
    The images of registered data sets of any kind together, without their annotations: a list of ``{"file_name",
    "image_id", "width", "height"}``. Sizes that a data set does not state are read from the images' headers.

    Raises:
        DatasetError: a data set that is not registered or not there, or holds no image.
    """
    records = []
    for name in names:
        if name not in DatasetCatalog:
            raise DatasetError(unknown_name("data set", name, DatasetCatalog.list()))
        for x in DatasetCatalog.get(name):
            record = {key: x[key] for key in ("file_name", "image_id", "width", "height") if key in x}
            if not {"width", "height"} <= set(record):
                record["width"], record["height"] = _size(name, record["file_name"])
            records.append(record)
    if not records:
        raise DatasetError(f"the data sets {', '.join(names)} hold no image")
    return records


def category_names(name: str) -> dict[int, str]:
    """The class names of a loaded data set by the category ids of its file; empty where it has none."""
    meta = MetadataCatalog.get(name)
    classes = list(meta.get("thing_classes") or ())
    ids = meta.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(classes))}
    return {category: classes[i] for category, i in ids.items() if i < len(classes)}


def read_results(path: str, classes: Mapping[int, int], *, threshold: float, needs: Sequence[str] = ()) -> dict:
    """
    What a detector found, as COCO's evaluation reads it: a JSON list of ``{"image_id", "category_id", "bbox": [x, y,
    width, height], "score"}``, with "segmentation" or "keypoints".

    Args:
        classes: the student's class of each category id; detections of other categories are left out.
        threshold: detections with a lower score are left out.
        needs: of "segmentation" and "keypoints", those that every detection must have.

    Returns:
        Annotations, as dicts of Detectron2, by image id. Every image that the file names is there.

    Raises:
        DatasetError: a file that is not there or holds something else, no category of the student's, or no detection
            with such a score.
    """
    try:
        with open(path) as f:
            results = json.load(f)
    except (OSError, ValueError) as e:
        raise DatasetError(f"the results {path!r} cannot be read: {one_line(e)}") from None
    if not isinstance(results, list) or not results:
        found = f"a {type(results).__name__} with {first_few(list(results))}" if results else "nothing"
        raise DatasetError(f"the results {path!r}: expected a list of COCO detections, found {found}")
    ret: dict = {}
    for i, x in enumerate(results):
        if problem := _problem(x, needs):
            raise DatasetError(f"the results {path!r}: detection {i}: {problem}")
        annotations = ret.setdefault(x["image_id"], [])
        if x["category_id"] not in classes or x["score"] < threshold:
            continue
        annotation = {
            "bbox": x["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": classes[x["category_id"]],
            "iscrowd": 0,
            **{key: x[key] for key in needs},
        }
        if "keypoints" in needs:  # the third number of a result is a score, of an annotation whether it is visible
            annotation["keypoints"] = [2 if j % 3 == 2 else value for j, value in enumerate(x["keypoints"])]
        annotations.append(annotation)
    if not any(ret.values()):
        found = {x["category_id"] for x in results}
        if not found & set(classes):
            theirs, mine = (first_few([str(i) for i in sorted(ids)]) for ids in (found, classes))
            raise DatasetError(
                f"the results {path!r} are of other categories: they have the ids {theirs}, the student's are {mine}"
            )
        raise DatasetError(
            f"the results {path!r} have no detection of the student's classes with a score of {threshold}"
        )
    return ret


def _problem(x, needs: Sequence[str]) -> str:
    if not isinstance(x, dict) or not {"image_id", "category_id", "bbox", "score"} <= set(x):
        found = ", ".join(map(str, x)) if isinstance(x, dict) else repr(x)
        return f"expected image_id, category_id, bbox and score, found {found}"
    if not isinstance(x["image_id"], (int, str)):
        return f"expected a number or a name as image_id, found {x['image_id']!r}"
    box = x["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(v) for v in box) or min(box[2:]) < 0:
        return f"expected a bbox of x, y, width and height, found {box!r}"
    if not _is_finite(x["score"]) or not 0 <= x["score"] <= 1:
        return f"expected a score in 0..1, found {x['score']!r}"
    if not isinstance(x["category_id"], Integral):
        return f"expected a number as category_id, found {x['category_id']!r}"
    missing = [key for key in needs if not x.get(key)]
    return f"the student learns {missing[0]}, and it has none" if missing else ""


def _is_finite(value) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _find_images(name: str, source: str, root: str | None = None) -> list[dict]:
    if os.path.isdir(source):
        paths = sorted(
            os.path.join(folder, file)
            for folder, _, files in os.walk(source, followlinks=True)
            for file in files
            if file.lower().endswith(IMAGE_ENDINGS)
        )
        records = [{"file_name": path, "image_id": os.path.relpath(path, source)} for path in paths]
    else:
        base = os.path.dirname(source) if root is None else root
        try:
            with open(source) as f:
                if source.endswith(".json"):
                    content = json.load(f)
                    images = [{**x, "image_id": x["id"]} for x in content["images"]]
                    _set_classes(name, content.get("categories") or ())
                else:
                    images = [{"file_name": line.strip(), "image_id": line.strip()} for line in f if line.strip()]
            keys = ("image_id", "width", "height")
            records = [
                {"file_name": os.path.join(base, x["file_name"]), **{key: x[key] for key in keys if key in x}}
                for x in images
            ]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DatasetError(
                f"data set {name!r}: expected a folder of images, a COCO json, or a file with a path a line at "
                f"{source!r}; {type(e).__name__}: {one_line(e)}"
            ) from None
        missing = [x["file_name"] for x in records if not os.path.isfile(x["file_name"])]
        if missing:
            raise DatasetError(
                f"data set {name!r}: {len(missing)} of {len(records)} images are missing, the first is {missing[0]!r}"
            )
    if not records:
        raise DatasetError(f"data set {name!r}: no image in {source!r} (of the kinds {', '.join(IMAGE_ENDINGS)})")
    return records


def _set_classes(name: str, categories: Sequence[dict]) -> None:
    if categories:
        categories = sorted(categories, key=lambda x: x["id"])
        MetadataCatalog.get(name).set(
            thing_classes=[x["name"] for x in categories],
            thing_dataset_id_to_contiguous_id={x["id"]: i for i, x in enumerate(categories)},
        )


def _size(name: str, path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION, 1) >= _FIRST_TURNED
            return image.size[::-1] if turned else image.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise DatasetError(f"data set {name!r}: image {path} cannot be read ({one_line(e)})") from None
