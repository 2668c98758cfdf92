"""What configs/Study brings beside configs: the cells' data set and smoothed labels."""

import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from kd_det import add_kd_config
from kd_det.config_file import merge_config_file

STUDY = Path(__file__).parents[2] / "configs" / "Study"

CELL = "<annotation><size><width>640</width><height>480</height><depth>3</depth></size>{}</annotation>"
BOX = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def load(name):
    cfg = get_cfg()
    add_kd_config(cfg)
    merge_config_file(cfg, str(STUDY / name))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_cells_are_read_without_boxes_of_no_area(tmp_path, monkeypatch):
    load("cells_student.yaml")
    monkeypatch.setattr(sys.modules["study_cells"], "ROOT", str(tmp_path))
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_text("a\nb\n")
    boxes = BOX.format("WBC", 11, 21, 30, 40) + BOX.format("Platelets", 5, 6, 5, 6)
    (tmp_path / "Annotations/a.xml").write_text(CELL.format(boxes))
    (tmp_path / "Annotations/b.xml").write_text(CELL.format(""))
    record, empty = DatasetCatalog.get("study_cells_val")
    assert empty["annotations"] == []
    (annotation,) = record["annotations"]
    assert annotation["category_id"] == 1 and annotation["bbox"] == [10, 20, 30, 40]  # from 1-based, inclusive pixels


def test_smoothed_labels_by_the_formula():
    """Nine tenths of the cross entropy, and a tenth of the mean over all classes (with background) of -log p."""
    heads = build_model(load("digits_student_smoothed.yaml")).roi_heads
    torch.manual_seed(0)
    scores, deltas, classes = torch.randn(3, 11), torch.zeros(3, 40), torch.tensor([4, 10, 0])
    proposals = Instances((96, 96), proposal_boxes=Boxes(torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 3)), gt_classes=classes)
    proposals.gt_boxes = proposals.proposal_boxes
    log_p = scores.double().log_softmax(1)
    expected = -(0.9 * log_p[range(3), classes] + 0.1 * log_p.mean(1)).mean()
    found = heads.box_predictor.losses((scores, deltas), [proposals])
    assert found["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found["loss_box_reg"].item() == 0  # zero deltas, and boxes that are the truth
