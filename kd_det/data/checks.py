"""What is wrong with a data set, any in Detectron2's catalog, said in one line before training starts."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError, check_image_size, read_image
from detectron2.structures import BoxMode
from PIL import Image

from kd_det.data.voc import explain_voc
from kd_det.errors import IMPORT_HINT, DatasetError, one_line, unknown_name

__all__ = ["CheckedMapper", "DatasetError", "DatasetSummary", "check_dataset", "evaluator_type"]

# Reading every image is cheap for a small data set, minutes for COCO: beyond this size a sample is read.
READ_ALL_BELOW = 64 << 20  # bytes
SAMPLE = 256  # images

# A box may reach beyond its image by so many pixels: annotations are rounded.
ROUNDING = 1.0

_BOX_MODES = tuple(BoxMode)

# SyntaxError: Pillow, on a broken PNG.
UNREADABLE = (OSError, SyntaxError, SizeMismatchError, Image.DecompressionBombError)

# A JSON file becomes objects of several times its size.
LARGEST_JSON = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4  # bytes


@dataclass
class DatasetSummary:
    """
    Attributes:
        num_images: how many.
        num_annotations: objects, crowds included.
        num_instances: objects that training learns from: all but crowds.
        thing_classes: class names; empty if the metadata has none.
        largest_class: the largest class index of an annotation, -1 without annotations.
        num_keypoints: the numbers of keypoints that objects have.
        odd_boxes: boxes that are empty or reach beyond their image.
        first_odd_box: the first of them: file, number in the file's list, coordinates.
    """

    num_images: int
    thing_classes: tuple[str, ...] = ()
    num_annotations: int = 0
    num_instances: int = 0
    largest_class: int = -1
    num_keypoints: set[int] = field(default_factory=set)
    odd_boxes: int = 0
    first_odd_box: str = ""


def evaluator_type(name: str) -> str:
    """The evaluator of a data set; "coco" where its metadata names none: it evaluates any boxes with class names."""
    return MetadataCatalog.get(name).get("evaluator_type", "coco")


def check_dataset(name: str, needs: Mapping[str, str] | None = None, *, evaluated: bool = False) -> DatasetSummary:
    """
    Load the annotations of a registered data set with its own loader, and look at its images: all exist; and all of a
    small data set, or an even sample of a large one, can be read and have the size that the annotations state.
    (Training names an unreadable image outside the sample: see :class:`CheckedMapper`.)

    Args:
        name: as in ``cfg.DATASETS.TRAIN`` and ``TEST``.
        needs: keys that every object's annotation must have, such as "segmentation", and the config's key that needs
            each, for the message. Crowds, which are not learned from, may lack them.
        evaluated: the images need the ids by which evaluators match them.

    Raises:
        DatasetError: with what was found, where, what was expected, and how to make the files if that is known.
    """
    if name not in DatasetCatalog:
        raise DatasetError(f"{unknown_name('data set', name, DatasetCatalog.list())} {IMPORT_HINT}")
    meta = MetadataCatalog.get(name)
    path = meta.get("json_file") or ""
    if os.path.isfile(path) and (size := os.path.getsize(path)) > LARGEST_JSON:
        limit = f"this machine's memory holds {LARGEST_JSON:,} of JSON"
        raise DatasetError(f"data set '{name}' cannot be loaded: {path} has {size:,} bytes, and {limit}")
    try:
        dicts = DatasetCatalog.get(name)
    except DatasetError:
        raise
    except Exception as e:  # loaders fail in every way: with KeyError, AssertionError, a parser's own errors
        raise DatasetError(f"data set '{name}' cannot be loaded: {_explain(meta, e)}") from e
    if not dicts:
        raise DatasetError(f"data set '{name}' holds no images{_where(meta)}")
    summary = DatasetSummary(len(dicts), tuple(meta.get("thing_classes", ())))
    for record in dicts:
        where = f"data set '{name}', image {record.get('file_name', record.get('image_id'))}"
        if evaluated and "image_id" not in record:
            raise DatasetError(f"{where}: evaluation needs an 'image_id', the image has {', '.join(record)}")
        for key in ("width", "height"):
            if not isinstance(record.get(key, 0), Real):
                raise DatasetError(f"{where}: expected a number as '{key}', found {record[key]!r}")
        for i, annotation in enumerate(record.get("annotations", ())):
            _check_annotation(where, annotation, summary.thing_classes, needs or {})
            _count(summary, record, annotation, i)
    _check_images(name, meta, [record for record in dicts if "file_name" in record])
    return summary


class CheckedMapper:
    """Any Detectron2 mapper, with the image's path in the error when it cannot be read: Pillow's own names none."""

    def __init__(self, mapper: Callable[[dict], dict | None]):
        self.mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict | None:
        try:
            return self.mapper(dataset_dict)
        except UNREADABLE as e:
            raise DatasetError(_unreadable(dataset_dict.get("file_name", "(no file name)"), e)) from e


def _check_annotation(where: str, annotation: dict, classes: tuple[str, ...], needs: Mapping[str, str]) -> None:
    box = annotation.get("bbox", ())
    finite = all(isinstance(x, Real) and math.isfinite(x) for x in box)
    if not finite or len(box) not in (4, 5):  # 5: a rotated box
        raise DatasetError(f"{where}: expected a box of 4 finite numbers, found {list(box)}")
    if annotation.get("bbox_mode") not in _BOX_MODES:
        found = annotation.get("bbox_mode")
        raise DatasetError(f"{where}: expected a 'bbox_mode' such as BoxMode.XYXY_ABS with each box, found {found}")
    label = annotation.get("category_id")
    if not isinstance(label, Integral) or label < 0 or (classes and label >= len(classes)):
        expected = f"in 0..{len(classes) - 1}" if classes else "index"
        raise DatasetError(f"{where}: expected a class {expected}, found {label}")
    for key in needs:
        if key not in annotation and not annotation.get("iscrowd", 0):
            raise DatasetError(f"{where}: {needs[key]} needs '{key}' of every object; one has {', '.join(annotation)}")


def _count(summary: DatasetSummary, record: dict, annotation: dict, index: int) -> None:
    summary.num_annotations += 1
    summary.num_instances += not annotation.get("iscrowd", 0)
    summary.largest_class = max(summary.largest_class, annotation["category_id"])
    if annotation.get("keypoints"):
        summary.num_keypoints.add(len(annotation["keypoints"]) // 3)
    mode = annotation["bbox_mode"]
    if mode not in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
        return
    x0, y0, x1, y1 = annotation["bbox"]
    if mode == BoxMode.XYWH_ABS:
        x1, y1 = x0 + x1, y0 + y1
    beyond = x1 > record.get("width", math.inf) + ROUNDING or y1 > record.get("height", math.inf) + ROUNDING
    if beyond or min(x0, y0) < -ROUNDING or x1 <= x0 or y1 <= y0:
        summary.odd_boxes += 1
        summary.first_odd_box = summary.first_odd_box or (
            f"annotation {index} of {record.get('file_name', record.get('image_id'))}: x {x0:g} to {x1:g}, y {y0:g} to "
            f"{y1:g} in {record.get('width', '?')} x {record.get('height', '?')}"
        )


def _check_images(name: str, meta: Metadata, records: list[dict]) -> None:
    local = [record for record in records if "://" not in record["file_name"]]
    sizes, missing = [], []
    for record in local:
        try:
            sizes.append(os.stat(record["file_name"]).st_size)
        except (OSError, ValueError):  # ValueError: a name with a NUL
            missing.append(record["file_name"])
    if missing:
        problem = f"{len(missing)} of {len(local)} images are missing, the first is {missing[0]}"
        raise DatasetError(f"data set '{name}': {problem}{_remedy(meta)}")
    step = 1 if sum(sizes) <= READ_ALL_BELOW else max(1, len(local) // SAMPLE)
    for record in local[::step]:
        try:
            check_image_size(dict(record), read_image(record["file_name"], format="BGR"))
        except (*UNREADABLE, ValueError) as e:  # ValueError: Pillow, on metadata that unpack to too much
            problem = _unreadable(record["file_name"], e)
            raise DatasetError(f"data set '{name}': {problem}{_remedy(meta)}") from e


def _explain(meta: Metadata, error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}{_remedy(meta)}"
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) and meta.get("json_file"):
        return f"{meta.json_file} is not a readable JSON file ({one_line(error)}){_remedy(meta)}"
    if meta.get("dirname") and meta.get("split") and (problem := explain_voc(meta)):
        return problem + _remedy(meta)
    return f"{type(error).__name__}: {one_line(error)}{_where(meta)}"


def _unreadable(path: str, error: Exception) -> str:
    return f"image {path} cannot be read ({' '.join(str(error).split())})"


def _where(meta: Metadata) -> str:
    path = meta.get("json_file") or meta.get("dirname")
    return f" ({path})" if path else ""


def _remedy(meta: Metadata) -> str:
    """How to make the files; or, where Detectron2's own folder of data sets lacks this one, which that is."""
    root = meta.get("dirname") or meta.get("image_root") or ""
    if meta.get("make_command"):
        return f"; make it with: {meta.make_command}{' --overwrite' if os.path.exists(root) else ''}"
    builtin_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    if root.startswith(builtin_root + os.sep) and not os.path.exists(root):
        return f"; data sets are looked for in '{builtin_root}' ($DETECTRON2_DATASETS)"
    return ""
