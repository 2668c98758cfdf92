"""Class lists of data sets, config and teacher: only what is known is compared."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from kd_det import DistillationLoss, build_teacher
from kd_det.cli import add_teacher
from kd_det.cli.checks import PlannedRun
from kd_det.cli.checks.classes import check_class_lists, check_teacher_classes
from kd_det.data import DatasetSummary
from kd_det.losses.build import loss_class
from kd_det.teachers.build import get_teacher_cfg
from tests.tiny import distillation_cfg, tiny_cfg, tiny_retinanet_cfg

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


class AgreementLoss(DistillationLoss):
    """A project's, that compares class by class."""

    compares_classes = True


def test_a_teacher_of_other_classes(tmp_path, taught_on):
    """As many classes, in another order: the losses of kd_det match them by name, and maps have none."""
    teacher = tiny_cfg(depth=50, DATASETS__TRAIN=("taught_on",))
    cfg = distillation_cfg(tmp_path, "SoftTarget", "NST", teacher=teacher)
    other, same = planned(cfg, {"train": ABC}), planned(cfg, {"train": ["b", "a", "c"]})
    for run in (other, same):
        check_teacher_classes(run)
        run.model.losses["agreement"] = object.__new__(AgreementLoss)
    check_teacher_classes(same)
    with pytest.raises(ValueError, match="AgreementLoss compare.* 'train': class 0 is 'b' and 'a'"):
        check_teacher_classes(other)


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
    cfg = distillation_cfg(tmp_path, "SoftTargetLoss", **zoo)
    assert get_teacher_cfg(cfg).KD.TEACHER.CLASSES == []
    cfg.KD.TEACHER.merge_from_list(["WEIGHTS", "", "OPTS", []])  # the zoo's own
    assert get_teacher_cfg(cfg).KD.TEACHER.CLASSES[:2] == ["person", "bicycle"]
    cfg.KD.TEACHER.CLASSES = ABC
    assert get_teacher_cfg(cfg).KD.TEACHER.CLASSES == ABC


def test_a_config_file_that_inherits_anothers_data_sets(tmp_path, taught_on):
    """D3: the numbers of classes differ, so the names that the file inherited are not the teacher's."""
    for number, known in ((3, ["b", "a", "c"]), (2, [])):
        teacher = tiny_cfg(depth=50, DATASETS__TRAIN=("taught_on",), MODEL__ROI_HEADS__NUM_CLASSES=number)
        cfg = distillation_cfg(tmp_path, "SoftTargetLoss", teacher=teacher)
        assert get_teacher_cfg(cfg).KD.TEACHER.CLASSES == known
        assert build_teacher(cfg).class_names == tuple(known)


@pytest.mark.parametrize("names, part", [(["b", "a", "c"], "roi_heads"), (ABC, "roi_heads.box_head")])
def test_a_head_is_inherited_whole_where_the_classes_are_the_same(tmp_path, taught_on, names, part):
    """As many classes in another order have the same shapes."""
    cfg = tiny_cfg(DATASETS__TRAIN=("taught_on",), KD__TEACHER__CLASSES=names)
    (tmp_path / "teacher.yaml").write_text(tiny_cfg(depth=50).dump())
    add_teacher(cfg, str(tmp_path / "teacher.yaml"), weights="none.pth")
    assert cfg.KD.INHERIT == ("fpn", "proposal_generator", part)
    cfg = tiny_cfg(DATASETS__TRAIN=("taught_on",), KD__TEACHER__CLASS_MAP=[["q", 0]])
    with pytest.raises(ValueError, match="KD.TEACHER.CLASS_MAP: Unknown class of the student 'q'"):
        add_teacher(cfg, str(tmp_path / "teacher.yaml"), weights="none.pth")


def test_a_plain_retinanet_is_checked_as_any_student():
    """Its losses are a method of that name."""
    cfg = tiny_retinanet_cfg()
    run = PlannedRun(cfg, Namespace(eval_only=False), model=build_model(cfg))
    run.datasets = {"train": DatasetSummary(1, tuple(ABC))}
    check_teacher_classes(run)
