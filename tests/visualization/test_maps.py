"""What is drawn of a map, by hand."""

import torch
from detectron2.structures import Boxes, BoxMode, Instances

from kd_det.losses import partial_l2_loss
from kd_det.visualization.detections import found_objects
from kd_det.visualization.maps import (
    channel_response,
    counted_positions,
    difference,
    relative_attention,
    selectivity,
)


def test_attention_is_relative_to_its_mean():
    features = torch.tensor([[[1.0, 0.0]], [[2.0, -1.0]]])  # squares summed over channels: 5 and 1, mean 3
    torch.testing.assert_close(relative_attention(features), torch.tensor([[5 / 3, 1 / 3]]))
    torch.testing.assert_close(relative_attention(1e-3 * features), torch.tensor([[5 / 3, 1 / 3]]))
    assert not relative_attention(torch.zeros(2, 1, 2)).any()


def test_selectivity_is_the_peak_over_the_mean():
    features = torch.tensor([[1.0, 1, 1, 1], [0, -4, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]]).view(4, 2, 2)
    torch.testing.assert_close(selectivity(features), torch.tensor([1.0, 4, 3, 0]))
    normalised = features / features.flatten(1).norm(dim=1).clamp(min=1e-9)[:, None, None]
    torch.testing.assert_close(selectivity(normalised), selectivity(features))
    torch.testing.assert_close(channel_response(features, 2), torch.tensor([[3.0, 1], [0, 0]]))


def test_differences_are_taken_at_the_smaller_size():
    large = torch.arange(16.0).view(4, 4)  # pooled: 2.5, 4.5, 10.5, 12.5
    torch.testing.assert_close(difference(large, torch.ones(2, 2)), torch.tensor([[1.5, 3.5], [9.5, 11.5]]))
    torch.testing.assert_close(difference(torch.ones(2, 2), large), torch.tensor([[-1.5, -3.5], [-9.5, -11.5]]))


def test_counted_positions_are_those_where_partial_l2_has_a_gradient():
    student = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
    partial_l2_loss(student[None], target[None]).backward()
    share = (student.grad != 0).float().mean(0)
    torch.testing.assert_close(counted_positions(student.detach(), target), share)
    assert 0 < share.min() < share.max() <= 1


def test_an_object_is_found_by_class_overlap_and_score():
    boxes = [[0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10], [60, 0, 10, 10]]
    objects = [{"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1} for box in boxes]
    crowd = {"bbox": [0, 0, 90, 90], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 1}
    found = Instances((100, 100))
    # The first object is found; the others' detections are off by half, of another class, and of too low a score.
    found.pred_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [25, 0, 35, 10], [40, 0, 50, 10], [60, 0, 70, 10]]))
    found.pred_classes = torch.tensor([1, 1, 0, 1])
    found.scores = torch.tensor([0.9, 0.9, 0.9, 0.4])
    assert found_objects({"annotations": [*objects, crowd]}, found).tolist() == [True, False, False, False]
    assert found_objects({"annotations": objects}, found, min_score=0.4).tolist() == [True, False, False, True]
    assert found_objects({}, found).shape == (0,)
