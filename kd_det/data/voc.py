"""The files of a Pascal VOC data set: what Detectron2's loader and evaluator need, since their errors name no file."""

import math
import os
import re
import xml.etree.ElementTree as ET

from detectron2.data import Metadata, MetadataCatalog

from kd_det.errors import DatasetError, one_line, unknown_name

__all__ = ["check_voc_evaluation", "explain_voc"]

_BOX = tuple(f"bndbox/{corner}" for corner in ("xmin", "ymin", "xmax", "ymax"))


def check_voc_evaluation(name: str) -> None:
    """
    Raise ``DatasetError`` for the first file and place that Detectron2's VOC evaluator cannot read, although its loader
    can: it wants more of each object, and coordinates without a decimal point.
    """
    meta = MetadataCatalog.get(name)
    for image_id in _image_ids(meta):
        path = os.path.join(meta.dirname, "Annotations", image_id + ".xml")
        for i, item in enumerate(ET.parse(path).getroot().findall("object")):
            for place in ("truncated", "difficult", *_BOX):
                if not re.fullmatch(r"\s*-?\d+\s*", item.findtext(place, "")):
                    problem = f"expected an integer at object[{i + 1}]/{place}, found {item.findtext(place)!r}"
                    raise DatasetError(f"data set '{name}' cannot be evaluated: {path}: {problem}")
            if item.find("pose") is None:
                raise DatasetError(f"data set '{name}' cannot be evaluated: {path}: object[{i + 1}] has no pose")


def explain_voc(meta: Metadata) -> str | None:
    """The first file of a data set that the loader cannot use, or None."""
    image_set = os.path.join(meta.dirname, "ImageSets", "Main", meta.split + ".txt")
    try:
        ids = _image_ids(meta)
    except UnicodeDecodeError as e:
        return f"{image_set} is not a text file ({one_line(e)})"
    if len(ids) == 1:
        return f"{image_set} lists one image, and Detectron2's VOC loader needs two or more"
    odd = [line for line in ids if len(line.split()) != 1]
    if odd:
        return f"{image_set}: expected the name of one image a line, found {odd[0]!r}"
    for image_id in ids:
        path = os.path.join(meta.dirname, "Annotations", image_id + ".xml")
        try:
            root = ET.parse(path).getroot()
        except ET.ParseError as e:
            return f"{path} is not a readable XML file ({one_line(e)})"
        objects = range(1, len(root.findall("object")) + 1)
        for place in ("size/width", "size/height", *(f"object[{i}]/{place}" for i in objects for place in _BOX)):
            if not _is_number(root.findtext(place)):
                return f"{path}: expected a number at {place}, found {root.findtext(place)!r}"
        for label in (item.findtext("name") for item in root.findall("object")):
            if label not in meta.thing_classes:
                return f"{path}: {unknown_name('class', label, meta.thing_classes, most=20)}"
    return None


def _image_ids(meta: Metadata) -> list[str]:
    with open(os.path.join(meta.dirname, "ImageSets", "Main", meta.split + ".txt")) as f:
        return [line.strip() for line in f if line.strip()]


def _is_number(text: str | None) -> bool:
    try:
        return math.isfinite(float(text))
    except (TypeError, ValueError):
        return False
