"""What is wrong with a data set, any in Detectron2's catalog, said in one line before training starts."""

import json
import math
import os
import re
import xml.etree.ElementTree as ET
from numbers import Real
from typing import NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError, check_image_size, read_image
from PIL import Image

from kd_det.errors import unknown_name

__all__ = ["CheckedMapper", "DatasetError", "DatasetSummary", "check_dataset", "check_voc_evaluation"]

# Reading every image is cheap for a small data set, minutes for COCO: beyond this size a sample is read.
READ_ALL_BELOW = 64 << 20  # bytes
SAMPLE = 256  # images

_VOC_BOX = tuple(f"bndbox/{corner}" for corner in ("xmin", "ymin", "xmax", "ymax"))

# SyntaxError: Pillow, on a broken PNG.
UNREADABLE = (OSError, SyntaxError, SizeMismatchError, Image.DecompressionBombError)

# A JSON file becomes objects of several times its size.
LARGEST_JSON = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4  # bytes


class DatasetError(ValueError):
    """A data set that is not registered, not there, or not readable, in one line for the user."""


class DatasetSummary(NamedTuple):
    num_images: int
    num_instances: int
    thing_classes: tuple  # empty if the metadata names none


def check_dataset(name, needs=None):
    """
    Load the annotations of a registered data set with its own loader, and look at its images: all exist;
    and all of a small data set, or an even sample of a large one, can be read and have the size that the
    annotations state. (An unreadable image outside the sample is met in training: see
    :class:`CheckedMapper`.)

    Takes as long as Detectron2's own loading, plus a second or two. In a run of many processes, one of them
    is enough.

    Args:
        name: as in ``cfg.DATASETS.TRAIN`` and ``TEST``.
        needs (dict): keys that every object's annotation must have, such as "segmentation", and the config's key that
            asks for each, for the message. Crowds, which are not learned from, may lack them.

    Returns:
        DatasetSummary

    Raises:
        DatasetError: with what was found, where, what was expected, and how to make the files if that is
        known.
    """
    if name not in DatasetCatalog:
        raise DatasetError(unknown_name("data set", name, DatasetCatalog.list()))
    meta = MetadataCatalog.get(name)
    _check_json_size(name, meta)
    try:
        dicts = DatasetCatalog.get(name)
    except Exception as e:  # loaders fail in every way: with KeyError, AssertionError, a parser's own errors
        raise DatasetError(f"data set '{name}' cannot be loaded: {_explain(meta, e)}") from e
    if not dicts:
        raise DatasetError(f"data set '{name}' holds no images{_where(meta)}")
    classes = tuple(meta.get("thing_classes", ()))
    for record in dicts:
        _check_annotations(name, record, classes, needs or {})
    _check_images(name, meta, [record for record in dicts if "file_name" in record])
    return DatasetSummary(len(dicts), sum(len(record.get("annotations", ())) for record in dicts), classes)


def check_voc_evaluation(name):
    """
    Whether Detectron2's VOC evaluator can read the annotations of a data set that its loader can: it wants more of
    each object, and coordinates without a decimal point.

    Raises:
        DatasetError: names the first file and place.
    """
    meta = MetadataCatalog.get(name)
    for image_id in _voc_ids(meta):
        path = _voc_annotation(meta, image_id)
        for i, item in enumerate(ET.parse(path).getroot().findall("object")):
            for place in ("truncated", "difficult", *_VOC_BOX):
                if not re.fullmatch(r"\s*-?\d+\s*", item.findtext(place, "")):
                    problem = f"expected an integer at object[{i + 1}]/{place}, found {item.findtext(place)!r}"
                    raise DatasetError(f"data set '{name}' cannot be evaluated: {path}: {problem}")
            if item.find("pose") is None:
                raise DatasetError(f"data set '{name}' cannot be evaluated: {path}: object[{i + 1}] has no pose")


class CheckedMapper:
    """
    Any Detectron2 mapper (a callable from a dataset dict to the model's input), with the file's path in the
    error when the image cannot be read: Pillow's own message for a truncated file names none.
    """

    def __init__(self, mapper):
        self.mapper = mapper

    def __call__(self, dataset_dict):
        try:
            return self.mapper(dataset_dict)
        except UNREADABLE as e:
            raise DatasetError(_unreadable(dataset_dict.get("file_name", "(no file name)"), e)) from e


def _check_json_size(name, meta):
    path = meta.get("json_file") or ""
    if os.path.isfile(path) and os.path.getsize(path) > LARGEST_JSON:
        size = f"{path} has {os.path.getsize(path):,} bytes, and this machine's memory holds {LARGEST_JSON:,} of JSON"
        raise DatasetError(f"data set '{name}' cannot be loaded: {size}")


def _check_annotations(name, record, classes, needs):
    for annotation in record.get("annotations", ()):
        where = f"data set '{name}', image {record.get('file_name', record.get('image_id'))}"
        box = annotation.get("bbox", ())
        finite = all(isinstance(x, Real) and math.isfinite(x) for x in box)
        if not finite or len(box) not in (4, 5):  # 5: a rotated box
            raise DatasetError(f"{where}: expected a box of 4 finite numbers, found {list(box)}")
        label = annotation.get("category_id")
        if classes and label not in range(len(classes)):
            raise DatasetError(f"{where}: expected a class in 0..{len(classes) - 1}, found {label}")
        for key in needs:
            if key not in annotation and not annotation.get("iscrowd", 0):
                raise DatasetError(
                    f"{where}: {needs[key]} needs '{key}' of every object; one has {', '.join(annotation)}"
                )


def _check_images(name, meta, records):
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


def _explain(meta, error):
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}{_remedy(meta)}"
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) and meta.get("json_file"):
        return f"{meta.json_file} is not a readable JSON file ({_line(error)}){_remedy(meta)}"
    problem = _explain_voc(meta) if meta.get("dirname") and meta.get("split") else None
    if problem:
        return problem + _remedy(meta)
    return f"{type(error).__name__}: {_line(error)}{_where(meta)}"


def _explain_voc(meta):
    """The first file of a VOC data set that its loader cannot use, or None: the loader's errors name none."""
    image_set = _voc_image_set(meta)
    try:
        ids = _voc_ids(meta)
    except UnicodeDecodeError as e:
        return f"{image_set} is not a text file ({_line(e)})"
    if len(ids) == 1:
        return f"{image_set} lists one image, and Detectron2's VOC loader needs two or more"
    odd = [line for line in ids if len(line.split()) != 1]
    if odd:
        return f"{image_set}: expected the name of one image a line, found {odd[0]!r}"
    for image_id in ids:
        path = _voc_annotation(meta, image_id)
        try:
            root = ET.parse(path).getroot()
        except ET.ParseError as e:
            return f"{path} is not a readable XML file ({_line(e)})"
        places = ["size/width", "size/height"]
        for i in range(len(root.findall("object"))):
            places += [f"object[{i + 1}]/{place}" for place in _VOC_BOX]
        for place in places:
            if not _is_number(root.findtext(place)):
                return f"{path}: expected a number at {place}, found {root.findtext(place)!r}"
        for label in (item.findtext("name") for item in root.findall("object")):
            if label not in meta.thing_classes:
                return f"{path}: {unknown_name('class', label, meta.thing_classes, most=20)}"
    return None


def _voc_image_set(meta):
    return os.path.join(meta.dirname, "ImageSets", "Main", meta.split + ".txt")


def _voc_ids(meta):
    with open(_voc_image_set(meta)) as f:
        return [line.strip() for line in f if line.strip()]


def _voc_annotation(meta, image_id):
    return os.path.join(meta.dirname, "Annotations", image_id + ".xml")


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except (TypeError, ValueError):
        return False


def _unreadable(path, error):
    return f"image {path} cannot be read ({_line(error)})"


def _line(error):
    return " ".join(str(error).split())


def _where(meta):
    path = meta.get("json_file") or meta.get("dirname")
    return f" ({path})" if path else ""


def _remedy(meta):
    """How to make the files; or, where Detectron2's own folder of data sets lacks this one, which that is."""
    root = meta.get("dirname") or meta.get("image_root") or ""
    if meta.get("make_command"):
        return f"; make it with: {meta.make_command}{' --overwrite' if os.path.exists(root) else ''}"
    builtin_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    if root.startswith(builtin_root + os.sep) and not os.path.exists(root):
        return f"; data sets are looked for in '{builtin_root}' ($DETECTRON2_DATASETS)"
    return ""
