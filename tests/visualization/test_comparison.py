import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances

from kd_det.visualization import detection_grid, draw_detections, draw_ground_truth

METADATA = Metadata(thing_classes=["zero", "one"])


def changed(drawn, plain):
    """Rows and columns of the pixels that drawing changed, as (top, bottom, left, right)."""
    ys, xs = np.nonzero((drawn.astype(int) - plain).any(axis=2))
    return ys.min(), ys.max(), xs.min(), xs.max()


def instances(boxes, scores):
    found = Instances((40, 80))
    found.pred_boxes = Boxes(torch.tensor(boxes))
    found.scores = torch.tensor(scores)
    found.pred_classes = torch.zeros(len(scores), dtype=torch.int64)
    return found


def test_a_detection_is_drawn_where_it_is_at_the_scale_of_the_panel():
    image = np.full((40, 80, 3), 128, np.uint8)
    drawn = draw_detections(image, instances([[10.0, 20.0, 30.0, 36.0]], [0.9]), METADATA, width=320)
    assert drawn.shape == (160, 320, 3)  # four times the image: the box spans x 40..120, y 80..144
    top, bottom, left, right = changed(drawn, 128)
    assert 76 <= top <= 84 and 140 <= bottom <= 148 and 36 <= left <= 44
    assert right >= 116  # the label may be longer than the box


def test_detections_of_low_score_are_left_out():
    image = np.full((40, 80, 3), 128, np.uint8)
    found = instances([[10.0, 20.0, 30.0, 36.0]], [0.4])
    np.testing.assert_array_equal(draw_detections(image, found, METADATA, width=80), image)
    assert (draw_detections(image, found, METADATA, width=80, min_score=0.3) != image).any()


def test_ground_truth_is_drawn_where_the_same_detection_is():
    image = np.full((40, 80, 3), 128, np.uint8)
    annotation = {"bbox": [10, 20, 20, 16], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
    drawn = draw_ground_truth(image, {"annotations": [annotation]}, METADATA, width=320)
    top, bottom, left, _ = changed(drawn, 128)
    assert 76 <= top <= 84 and 140 <= bottom <= 148 and 36 <= left <= 44


def test_ground_truth_has_masks_where_the_detector_finds_them():
    image = np.full((40, 80, 3), 128, np.uint8)
    box = {"bbox": [10, 4, 40, 32], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
    masked = {"annotations": [{**box, "segmentation": [[12, 6, 48, 6, 48, 34, 12, 34]]}], "sem_seg_file_name": "no.png"}
    found = instances([[10.0, 4.0, 50.0, 36.0]], [0.9])
    drawn = draw_ground_truth(image, masked, METADATA, width=320, like=found)
    plain = draw_ground_truth(image, {"annotations": [box]}, METADATA, width=320)
    assert (drawn[120:136, 60:180] == 128).all() and (plain[120:136, 60:180] == 128).all()  # inside the box
    found.pred_masks = torch.zeros(1, 40, 80)
    drawn = draw_ground_truth(image, masked, METADATA, width=320, like=found)
    assert (drawn[120:136, 60:180] != 128).any(axis=2).all()


def test_colours_stay_bgr():
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 200
    drawn = draw_ground_truth(image, {"annotations": []}, METADATA, width=16)
    np.testing.assert_array_equal(drawn, image)


def test_grid_places_every_panel():
    panels = [[np.full((10, 40, 3), 50 * i + 10 * j, np.uint8) for j in range(3)] for i in range(2)]
    grid = detection_grid(["a", "b", "c"], panels)
    assert grid.shape == (28 + 2 * (10 + 6), 3 * 40 + 2 * 6, 3)
    for i in range(2):
        for j in range(3):
            top, left = 28 + i * 16, j * 46
            np.testing.assert_array_equal(grid[top : top + 10, left : left + 40], panels[i][j])
    assert (grid[:28] < 255).any()  # the titles


def test_grid_refuses_what_does_not_fit():
    panel, other = np.zeros((10, 40, 3), np.uint8), np.zeros((12, 40, 3), np.uint8)
    with pytest.raises(ValueError, match=r"rows of 2 panels, found \[1\]"):
        detection_grid(["a", "b"], [[panel]])
    with pytest.raises(ValueError, match="found \\(height, width\\)"):
        detection_grid(["a", "b"], [[panel, other]])
