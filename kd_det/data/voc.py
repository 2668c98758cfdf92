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
    Whether Detectron2's VOC evaluator can read the annotations of a data set that its loader can: it wants more of
    each object, and coordinates without a decimal point.

    Raises:
        DatasetError: names the first file and place.
    """
    meta = MetadataCatalog.get(name)
    for image_id in _image_ids(meta):
        path = _annotation_file(meta, image_id)
        for i, item in enumerate(ET.parse(path).getroot().findall("object")):
            for place in ("truncated", "difficult", *_BOX):
                if not re.fullmatch(r"\s*-?\d+\s*", item.findtext(place, "")):
                    problem = f"expected an integer at object[{i + 1}]/{place}, found {item.findtext(place)!r}"
                    raise DatasetError(f"data set '{name}' cannot be evaluated: {path}: {problem}")
            if item.find("pose") is None:
                raise DatasetError(f"data set '{name}' cannot be evaluated: {path}: object[{i + 1}] has no pose")


def explain_voc(meta: Metadata) -> str | None:
    """The first file of a data set that the loader cannot use, or None."""
    image_set = _image_set_file(meta)
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
        path = _annotation_file(meta, image_id)
        try:
            root = ET.parse(path).getroot()
        except ET.ParseError as e:
            return f"{path} is not a readable XML file ({one_line(e)})"
        places = ["size/width", "size/height"]
        for i in range(len(root.findall("object"))):
            places += [f"object[{i + 1}]/{place}" for place in _BOX]
        for place in places:
            if not _is_number(root.findtext(place)):
                return f"{path}: expected a number at {place}, found {root.findtext(place)!r}"
        for label in (item.findtext("name") for item in root.findall("object")):
            if label not in meta.thing_classes:
                return f"{path}: {unknown_name('class', label, meta.thing_classes, most=20)}"
    return None


def _image_set_file(meta: Metadata) -> str:
    return os.path.join(meta.dirname, "ImageSets", "Main", meta.split + ".txt")


def _image_ids(meta: Metadata) -> list[str]:
    with open(_image_set_file(meta)) as f:
        return [line.strip() for line in f if line.strip()]


def _annotation_file(meta: Metadata, image_id: str) -> str:
    return os.path.join(meta.dirname, "Annotations", image_id + ".xml")


def _is_number(text: str | None) -> bool:
    try:
        return math.isfinite(float(text))
    except (TypeError, ValueError):
        return False
