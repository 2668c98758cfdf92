"""Class lists of data sets, config and teacher: only what is known is compared."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from detectron2.data import MetadataCatalog

from kd_det.cli.checks import PlannedRun
from kd_det.cli.checks.classes import check_class_lists, check_teacher_classes
from kd_det.data import DatasetSummary
from kd_det.losses.build import loss_class
from tests.tiny import distillation_cfg, tiny_cfg

ABC = ["a", "b", "c"]


def planned(cfg, found, *, allow_unused_classes=False):
    """A run whose data sets have these classes, and whose losses are the config's, unbuilt."""
    losses = {name: object.__new__(loss_class(name)) for name in cfg.KD.LOSSES}
    args = Namespace(eval_only=False, allow_unused_classes=allow_unused_classes)
    datasets = {name: DatasetSummary(1, tuple(classes)) for name, classes in found.items()}
    return PlannedRun(cfg, args, model=SimpleNamespace(losses=losses), datasets=datasets)


@pytest.mark.parametrize(
    "found,message",
    [
        ({"train": ABC, "val": ["a", "c", "b"]}, "'train' and 'val' have different classes: class 1 is 'b' and 'c'"),
        ({"train": ABC, "val": ABC[:2]}, "different classes: 3 and 2 classes"),
        ({"train": [*ABC, "d"]}, "'train' has 4 classes and MODEL.ROI_HEADS.NUM_CLASSES is 3"),
        # D46: at e7565a7 a warning, and an AssertionError in the evaluation after training.
        ({"train": ABC[:2]}, "'train' has 2 classes .* is 3: set MODEL.ROI_HEADS.NUM_CLASSES 2, or .*--allow-unused"),
    ],
)
def test_lists_that_differ(found, message):
    with pytest.raises(ValueError, match=message):
        check_class_lists(planned(tiny_cfg(), found))


def test_lists_that_agree_and_lists_that_are_not_known():
    for found in ({"train": ABC, "val": tuple(ABC)}, {"train": (), "val": ABC}, {}):
        check_class_lists(planned(tiny_cfg(), found))
    check_class_lists(planned(tiny_cfg(), {"train": ABC[:2]}, allow_unused_classes=True))


def test_a_class_index_beyond_the_head_where_no_names_are_known():
    run = planned(tiny_cfg(), {"train": ()})
    run.datasets["train"].largest_class = 3
    with pytest.raises(ValueError, match="'train' has 4 classes and MODEL.ROI_HEADS.NUM_CLASSES is 3"):
        check_class_lists(run)


@pytest.fixture
def taught_on():
    """A data set whose three classes stand in another order than the student's."""
    MetadataCatalog.get("taught_on").thing_classes = ["b", "a", "c"]
    yield
    MetadataCatalog.remove("taught_on")


@pytest.mark.parametrize("loss,refused", [("SoftTargetLoss", True), ("NSTLoss", False)])
def test_a_teacher_of_other_classes(tmp_path, taught_on, loss, refused):
    """As many classes, in another order: only a loss on class logits minds."""
    cfg = distillation_cfg(tmp_path, loss, teacher=tiny_cfg(depth=50, DATASETS__TRAIN=("taught_on",)))
    if refused:
        with pytest.raises(ValueError, match="SoftTargetLoss compare.*'taught_on'.*class 0 is 'b' and 'a'"):
            check_teacher_classes(planned(cfg, {"train": ABC}))
    else:
        check_teacher_classes(planned(cfg, {"train": ABC}))
    check_teacher_classes(planned(cfg, {"train": ["b", "a", "c"]}))


@pytest.mark.parametrize(
    "opts",
    [
        # D3, the example in config.py: the zoo's config with another number of classes and one's own weights.
        {"KD__TEACHER__OPTS": ["MODEL.ROI_HEADS.NUM_CLASSES", 3]},
        # The zoo's 80 classes, and weights that may have been trained on 80 others.
        {"MODEL__ROI_HEADS__NUM_CLASSES": 80},
    ],
)
def test_a_zoo_config_tells_nothing_of_other_weights(tmp_path, opts):
    zoo = {"KD__TEACHER__CONFIG_FILE": "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", **opts}
    classes = [f"mine {i}" for i in range(opts.get("MODEL__ROI_HEADS__NUM_CLASSES", 3))]
    run = planned(distillation_cfg(tmp_path, "SoftTargetLoss", **zoo), {"train": classes})
    check_teacher_classes(run)
    run.cfg.KD.TEACHER.merge_from_list(["WEIGHTS", "", "OPTS", []])  # the zoo's own
    if len(classes) == 80:
        with pytest.raises(ValueError, match="'coco_2017_train'"):
            check_teacher_classes(run)


def test_a_config_file_that_inherits_anothers_data_sets(tmp_path, taught_on):
    """D3: the numbers of classes differ, so the names that the file inherited are not the teacher's."""
    teacher = tiny_cfg(depth=50, DATASETS__TRAIN=("taught_on",), MODEL__ROI_HEADS__NUM_CLASSES=2)
    cfg = distillation_cfg(tmp_path, "SoftTargetLoss", teacher=teacher)
    check_teacher_classes(planned(cfg, {"train": ["x", "y"]}))
