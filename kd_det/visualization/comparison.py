"""The same images with the ground truth and the detections of several models, side by side, in one picture."""

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

__all__ = ["detection_grid", "draw_detections", "draw_ground_truth"]

_GAP = 6  # pixels between panels
_HEADER = 28  # pixels of the line of titles
_WHITE = 255


def draw_ground_truth(image: np.ndarray, record: dict, metadata: Metadata, *, width: int = 320) -> np.ndarray:
    """
    Draw the annotated boxes of a dataset dict.

    Args:
        image: (H, W, 3) uint8, BGR.
        record: a dataset dict of the image, in Detectron2's format.
        metadata: of the data set; names the classes.
        width: of the result, in pixels. The image is scaled before boxes and labels are drawn, so they stay sharp.

    Returns:
        (round(H * width / W), width, 3) uint8, BGR.
    """
    visualizer, scale = _visualizer(image, metadata, width)
    annotations = [
        {**annotation, "bbox": [x * scale for x in annotation["bbox"]]} for annotation in record.get("annotations", [])
    ]
    # Only boxes: masks and keypoints would have to be scaled as well.
    annotations = [{k: a[k] for k in ("bbox", "bbox_mode", "category_id")} for a in annotations]
    return _bgr(visualizer.draw_dataset_dict({"annotations": annotations}))


def draw_detections(
    image: np.ndarray, instances: Instances, metadata: Metadata, *, width: int = 320, min_score: float = 0.5
) -> np.ndarray:
    """
    Draw the boxes that a detector found.

    Args:
        image: (H, W, 3) uint8, BGR.
        instances: with ``pred_boxes``, ``pred_classes`` and ``scores``, in pixels of ``image``.
        metadata: of the data set; names the classes.
        width: see :func:`draw_ground_truth`.
        min_score: detections below this score are left out.

    Returns:
        (round(H * width / W), width, 3) uint8, BGR.
    """
    visualizer, scale = _visualizer(image, metadata, width)
    instances = instances.to("cpu")
    instances = instances[instances.scores >= min_score]
    shown = Instances(visualizer.img.shape[:2])
    shown.pred_boxes = Boxes(instances.pred_boxes.tensor.detach() * scale)
    shown.pred_classes, shown.scores = instances.pred_classes, instances.scores.detach()
    return _bgr(visualizer.draw_instance_predictions(shown))


def detection_grid(titles: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """
    Put panels into one picture, a title above each column.

    Args:
        titles: one a column. Letters outside ASCII cannot be drawn.
        rows: each row's panels, (h, w, 3) uint8, BGR. All panels have one width, those of a row one height.

    Returns:
        (H, W, 3) uint8, BGR, for ``cv2.imwrite``.

    Raises:
        ValueError: no row, rows of other lengths than ``titles``, or panels whose sizes differ.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"Expected rows of {len(titles)} panels, found {[len(row) for row in rows]}.")
    width = rows[0][0].shape[1]
    for row in rows:
        sizes = [panel.shape[:2] for panel in row]
        if set(sizes) != {(sizes[0][0], width)}:
            raise ValueError(f"Expected panels of width {width} and one height a row, found (height, width) {sizes}.")
    header = np.full((_HEADER, _span(len(titles), width), 3), _WHITE, np.uint8)
    for column, title in enumerate(titles):
        # The baseline of a text of this size is 20 pixels below the top.
        origin = (column * (width + _GAP) + 2, 20)
        cv2.putText(header, title, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    lines = [header]
    for row in rows:
        line = np.full((row[0].shape[0] + _GAP, header.shape[1], 3), _WHITE, np.uint8)
        for column, panel in enumerate(row):
            left = column * (width + _GAP)
            line[: panel.shape[0], left : left + width] = panel
        lines.append(line)
    return np.concatenate(lines)


def _span(columns: int, width: int) -> int:
    return columns * width + (columns - 1) * _GAP


def _visualizer(image: np.ndarray, metadata: Metadata, width: int) -> tuple[Visualizer, float]:
    scale = width / image.shape[1]
    scaled = cv2.resize(image, (width, round(image.shape[0] * scale)), interpolation=cv2.INTER_CUBIC)
    return Visualizer(scaled[:, :, ::-1], metadata), scale


def _bgr(drawn) -> np.ndarray:
    return np.ascontiguousarray(drawn.get_image()[:, :, ::-1])
