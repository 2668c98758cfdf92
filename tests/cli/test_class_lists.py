import logging

import pytest
from detectron2.data import MetadataCatalog

from kd_det.cli.class_lists import check_class_lists
from tests.tiny import distillation_cfg, tiny_cfg

ABC = ["a", "b", "c"]


@pytest.mark.parametrize(
    "found,message",
    [
        ({"train": ABC, "val": ["a", "c", "b"]}, "'train' and 'val' have different classes: class 1 is 'b' and 'c'"),
        ({"train": ABC, "val": ABC[:2]}, "different classes: 3 and 2 classes"),
        ({"train": [*ABC, "d"]}, "'train' has 4 classes and MODEL.ROI_HEADS.NUM_CLASSES is 3"),
    ],
)
def test_lists_that_differ(found, message):
    with pytest.raises(ValueError, match=message):
        check_class_lists(tiny_cfg(), found)


def test_lists_that_agree_and_lists_that_are_not_known():
    check_class_lists(tiny_cfg(), {"train": ABC, "val": tuple(ABC)})
    check_class_lists(tiny_cfg(), {"train": (), "val": ABC})
    check_class_lists(tiny_cfg(), {})


def test_classes_that_are_never_seen(caplog):
    with caplog.at_level(logging.WARNING, logger="kd_det"):
        check_class_lists(tiny_cfg(), {"train": ABC[:2]})
    assert [r.getMessage() for r in caplog.records] == [
        "data set 'train' has 2 classes and MODEL.ROI_HEADS.NUM_CLASSES is 3: 1 classes will never be seen."
    ]


@pytest.mark.parametrize("loss,refused", [("SoftTargetLoss", True), ("NSTLoss", False)])
def test_a_teacher_of_other_classes(tmp_path, loss, refused):
    """As many classes, in another order: only a loss on class logits minds."""
    MetadataCatalog.get("taught_on").thing_classes = ["b", "a", "c"]
    cfg = distillation_cfg(tmp_path, loss, teacher=tiny_cfg(depth=50, DATASETS__TRAIN=("taught_on",)))
    try:
        if refused:
            with pytest.raises(ValueError, match="SoftTargetLoss compare.*'taught_on'.*class 0 is 'b' and 'a'"):
                check_class_lists(cfg, {"train": ABC})
        else:
            check_class_lists(cfg, {"train": ABC})
        check_class_lists(cfg, {"train": ["b", "a", "c"]})
    finally:
        MetadataCatalog.remove("taught_on")
