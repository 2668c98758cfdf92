"""
Pictures of detections side by side. Images are (H, W, 3) uint8, BGR; drawings are ``width`` pixels wide.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer
from matplotlib.colors import hsv_to_rgb
from torch import Tensor

__all__ = ["annotated_objects", "detection_grid", "draw_detections", "draw_ground_truth", "found_objects"]

_GOLDEN = 0.618  # of the circle of hues between two classes: the golden ratio keeps any number of them apart
_UNNAMED_CLASSES = 1000  # where no data set says how many there are
_KINDS = {"segmentation": "pred_masks", "keypoints": "pred_keypoints"}  # of annotations, and where they are predicted
_GAP = 6  # pixels between panels
_LABELS_A_WIDTH = 24  # as many labels as high as a drawing is wide
_TITLE = 22  # height of the line of titles in pixels; the baseline of its text is at 20


def draw_ground_truth(
    image: np.ndarray, record: dict, metadata: Metadata, *, width: int = 320, like: Instances | None = None
) -> np.ndarray:
    """
    Draw the annotations of a dataset dict, with the class names of ``metadata``. ``like`` is what a detector found: of
    masks and keypoints, only those of its kind are drawn.
    """
    if like is not None:
        kinds = [kind for kind, found in _KINDS.items() if not like.has(found)]
        objects = record.get("annotations", ())
        record = {"annotations": [{k: v for k, v in x.items() if k not in kinds} for x in objects]}
    return _bgr(_visualizer(image, metadata, width).draw_dataset_dict(record))


def draw_detections(
    image: np.ndarray, instances: Instances, metadata: Metadata, *, width: int = 320, min_score: float = 0.5
) -> np.ndarray:
    """Draw what a detector found in the image with ``min_score`` or more."""
    instances = instances.to("cpu")
    found = instances[instances.scores >= min_score]
    return _bgr(_visualizer(image, metadata, width).draw_instance_predictions(found))


def annotated_objects(record: dict) -> tuple[Boxes, Tensor]:
    """The boxes and classes of a dataset dict's annotations, without crowds."""
    objects = [x for x in record.get("annotations", ()) if not x.get("iscrowd", 0)]
    boxes = [BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    classes = torch.tensor([x["category_id"] for x in objects], dtype=torch.int64)
    return Boxes(torch.tensor(boxes).reshape(-1, 4)), classes


def found_objects(record: dict, instances: Instances, *, min_score: float = 0.5, min_iou: float = 0.5) -> Tensor:
    """
    Which of the annotated objects of an image, crowds left out, a detector finds, bool (objects,): those with a
    detection of their class, of ``min_score`` or more, that overlaps them by ``min_iou`` or more.
    """
    boxes, classes = annotated_objects(record)
    found = instances.to("cpu")[instances.scores.cpu() >= min_score]
    overlaps = pairwise_iou(boxes, found.pred_boxes) >= min_iou
    return (overlaps & (classes[:, None] == found.pred_classes)).any(1)


def detection_grid(titles: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """
    Put panels into one picture, a title (in ASCII) above each column.

    Raises:
        ValueError: no row, rows of other lengths than ``titles``, panels of several widths, or of several heights in a
            row.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"Expected rows of {len(titles)} panels, found {[len(row) for row in rows]}.")
    width = rows[0][0].shape[1]
    header = [np.full((_TITLE, width, 3), 255, np.uint8) for _ in titles]
    for panel, title in zip(header, titles):
        cv2.putText(panel, title, (2, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    lines = []
    for row in (header, *rows):
        sizes = [panel.shape[:2] for panel in row]
        if set(sizes) != {(sizes[0][0], width)}:
            raise ValueError(f"Expected panels of width {width} and one height a row, found (height, width) {sizes}.")
        padded = [np.pad(panel, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255) for panel in row]
        lines.append(np.concatenate(padded, axis=1)[:, :-_GAP])
    return np.concatenate(lines)


def _visualizer(image: np.ndarray, metadata: Metadata, width: int) -> Visualizer:
    # One bright colour a class, in every drawing: without them, each box has a random one, which may be black.
    classes = len(metadata.get("thing_classes", ())) or _UNNAMED_CLASSES
    hues = np.arange(classes) * _GOLDEN % 1
    colours = 255 * hsv_to_rgb(np.stack([hues, np.full(classes, 0.7), np.ones(classes)], axis=1))
    metadata = Metadata(**{**metadata.as_dict(), "thing_colors": colours.tolist()})
    scale = width / image.shape[1]
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale=scale, instance_mode=ColorMode.SEGMENTATION)
    # Private, and without a public way: Detectron2 chooses a size by the image, a few pixels for a small one, which no
    # scale makes readable. Here labels have the same size in every drawing.
    visualizer._default_font_size = image.shape[1] / _LABELS_A_WIDTH
    return visualizer


def _bgr(drawn: VisImage) -> np.ndarray:
    return np.ascontiguousarray(drawn.get_image()[:, :, ::-1])
