"""A teacher is evaluated by itself, as it teaches."""

import copy
import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from kd_det import build_student, build_teacher, student_cfg
from kd_det.cli import argument_parser, check_run, load_config, parse_arguments
from kd_det.cli import evaluate_teacher as command
from kd_det.engine import Trainer
from kd_det.engine.teacher_evaluation import TeacherDetector, evaluate_teacher, register_first_images
from kd_det.errors import UserError
from kd_det.teachers import FeatureTeacher
from tests.classification.tiny_classifier import distilled_cfg, write_folder
from tests.engine.test_distributed import on_two_ranks
from tests.tiny import batch, tiny_cfg
from tests.tiny_run import differing, run_cfg, train


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


def cfg_with_test_set(tmp_path, *losses, **opts):
    cfg = run_cfg(tmp_path, *losses, **opts)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    return cfg


def detections(outputs):
    found = [output["instances"] for output in outputs]
    return [torch.cat([x.pred_boxes.tensor, x.scores[:, None], x.pred_classes[:, None]], dim=1) for x in found]


def in_rgb(model):
    """The same detector for images in the other channel order."""
    model = copy.deepcopy(model)
    stem = model.backbone.bottom_up.stem.conv1.weight
    stem.data = stem.data.flip(1)
    model.pixel_mean, model.pixel_std = model.pixel_mean.flip(0), model.pixel_std.flip(0)
    model.input_format = "RGB"
    return model


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_it_detects_what_it_detects_in_plain_detectron2(tmp_path, order):
    """
    An image of 50 x 70 is padded to 64 x 96 by the student; the teacher alone, whose size_divisibility is 1 here, pads
    nothing: given the student's canvas, it finds the same.
    """
    cfg = run_cfg(tmp_path)
    model, student = build_teacher(cfg), build_student(cfg)
    inputs = batch(((50, 70),))
    want = detections(model(inputs))
    teacher = in_rgb(model) if order == "RGB" else model
    found = detections(TeacherDetector(student, teacher, input_format="BGR").eval()(inputs))
    assert len(want[0]) and torch.allclose(found[0], want[0], atol=1e-3)
    shapes = []
    teacher.backbone.bottom_up.register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape[-2:])))
    student.backbone._size_divisibility = 128
    TeacherDetector(student, teacher, input_format="BGR").eval()(inputs)
    assert shapes == [(128, 128)]


def test_results_are_those_of_its_own_evaluation(tmp_path):
    cfg = cfg_with_test_set(tmp_path)
    teacher = build_teacher(cfg)
    found = evaluate_teacher(cfg, build_student(cfg), teacher, Trainer)
    want = Trainer.test(cfg, teacher)
    assert found["bbox"].keys() == want["bbox"].keys() and str(found) == str(want)
    assert not teacher.backbone._forward_pre_hooks and not teacher.training


def test_classes_are_matched_by_name(tmp_path):
    """The teacher knows classes two, x and 0; the data set has 0, 1 and 2."""
    cfg = run_cfg(tmp_path)
    teacher, student, inputs = build_teacher(cfg), build_student(cfg), batch(((64, 96),))
    (plain,) = detections(teacher(inputs))
    assert plain[:, -1].unique().tolist() == [0, 1, 2]
    teacher.class_names = ("two", "x", "0")
    known = {"classes": ["0", "1", "2"], "class_map": [["2", "two"]]}
    detector = TeacherDetector(student, teacher, input_format="BGR", **known).eval()
    (found,) = detections(detector(inputs))
    want = plain[plain[:, -1] != 1]
    want[:, -1] = 2 - want[:, -1]
    assert torch.equal(found, want)


@pytest.mark.parametrize(
    "names, classes, message",
    [
        (("cat", "dog", "cow"), ["0", "1"], "no class in common"),
        ((), ["0", "1"], "2 classes and the teacher 3"),
    ],
)
def test_other_classes(tmp_path, names, classes, message):
    cfg = run_cfg(tmp_path)
    teacher = build_teacher(cfg)
    teacher.class_names = names
    with pytest.raises(UserError, match=message):
        TeacherDetector(build_student(cfg), teacher, input_format="BGR", classes=classes)


def test_feature_maps_are_no_detections(tmp_path):
    teacher = FeatureTeacher(network=build_model(tiny_cfg()).backbone)
    with pytest.raises(UserError, match="the teacher gives feature maps and no detections: there is nothing to evalua"):
        TeacherDetector(build_student(run_cfg(tmp_path)), teacher, input_format="BGR")


def write(tmp_path, **opts):
    cfg = cfg_with_test_set(tmp_path, "NST", **opts)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    return ["--config-file", str(tmp_path / "run.yaml")]


def test_the_command_prints_a_table_and_writes_nothing(tmp_path, capsys):
    argv = write(tmp_path)
    command.main(argv)
    assert "bbox/AP50" in capsys.readouterr().out
    command.main([*argv, "--images", "3"])
    assert "bbox/AP50" in capsys.readouterr().out
    assert len(DatasetCatalog.get("tiny_first_3")) == 3 and not (tmp_path / "out").exists()
    DatasetCatalog.remove("tiny_first_3")
    MetadataCatalog.remove("tiny_first_3")


def test_the_command_takes_any_config_and_a_teacher(tmp_path, capsys):
    argv = write(tmp_path)
    plain = cfg_with_test_set(tmp_path)
    plain.merge_from_list(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "KD.TEACHER.CONFIG_FILE", ""])
    (tmp_path / "run.yaml").write_text(plain.dump())
    teacher = ["--teacher", str(tmp_path / "teacher.yaml"), "--teacher-weights", str(tmp_path / "teacher.pth")]
    command.main([*argv, *teacher])
    assert "bbox/AP50" in capsys.readouterr().out


@pytest.mark.parametrize(
    "opts, message",
    [
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty: there is nothing to evaluate on"),
        (["DATASETS.TEST", "('tinny',)"], "tinny"),
        (["KD.TEACHER.CONFIG_FILE", ""], "KD.TEACHER.CONFIG_FILE is empty"),
        (["KD.TEACHER.WEIGHTS", "nowhere.pth"], "do not exist: 'nowhere.pth'"),
        (["KD.TEACHER.DTYPE", "int8"], "Unknown KD.TEACHER.DTYPE 'int8'"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, opts, message):
    with pytest.raises(SystemExit):
        command.main([*write(tmp_path), *opts])
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and message in err[-1]


def test_the_first_images(tmp_path):
    cfg = cfg_with_test_set(tmp_path)
    name = register_first_images("tiny", 2)
    assert [x["image_id"] for x in DatasetCatalog.get(name)] == [0, 1]
    assert MetadataCatalog.get(name).thing_classes == ["0", "1", "2"]
    cfg.DATASETS.TEST = (name,)
    assert "AP" in evaluate_teacher(cfg, build_student(cfg), build_teacher(cfg), Trainer)["bbox"]
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_a_classifiers_teacher(tmp_path, capsys):
    folder = write_folder(tmp_path / "animals")
    opts = {"CLASSIFICATION__IMAGE_FOLDERS": [["animals", folder]], "DATASETS__TEST": ("animals",)}
    cfg = distilled_cfg(tmp_path, "NST", **opts, DATALOADER__NUM_WORKERS=0)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    command.main(["--config-file", str(tmp_path / "run.yaml")])
    whole = capsys.readouterr().out
    assert "classification/top1" in whole
    command.main(["--config-file", str(tmp_path / "run.yaml"), "--images", "3"])
    assert "classification/top1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "opts, message",
    [
        (["DATASETS.TEST", "()"], "KD.TEACHER.EVALUATE needs data sets to evaluate on, and DATASETS.TEST is empty"),
        (["KD.TEACHER.OPTS", "['MODEL.ROI_HEADS.NUM_CLASSES', 2]"], "3 classes and the teacher 2"),
    ],
)
def test_a_training_that_cannot_evaluate_it(tmp_path, opts, message):
    argv = [*write(tmp_path, KD__TEACHER__EVALUATE=True), *opts]
    if "2]" in opts[1]:
        teacher = tiny_cfg(depth=50, width=8, MODEL__ROI_HEADS__NUM_CLASSES=2)
        torch.save({"model": build_model(teacher).state_dict()}, tmp_path / "teacher.pth")
    args = parse_arguments(argument_parser(), argv)
    with pytest.raises(UserError, match=message):
        check_run(load_config(args), args)


LAZY = """
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from kd_det.compat import model_zoo
from kd_det.engine.evaluation import COCOEvaluator
from lazy_teacher_project import network

model = L(network)(path={student!r})
dataset = L(get_detection_dataset_dicts)(names="tiny", filter_empty=False)
mapper = L(DatasetMapper)(is_train=False, augmentations=[], image_format="BGR")
dataloader = dict(
    train=[],
    test=L(build_detection_test_loader)(dataset=dataset, mapper=mapper, num_workers=0),
    evaluator=L(COCOEvaluator)(dataset_name="tiny", output_dir={output!r}),
)
optimizer, lr_multiplier = dict(), dict()
train = dict(device="cpu", init_checkpoint="", output_dir="out")
"""
LAZY_PROJECT = """
from detectron2.config import get_cfg
from detectron2.modeling import build_model
import tests.tiny

def network(path):
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return build_model(cfg)
"""


def test_a_lazy_configs_teacher(tmp_path, capsys, monkeypatch):
    write(tmp_path)
    (tmp_path / "student.yaml").write_text(student_cfg(tiny_cfg()).dump())
    (tmp_path / "lazy_teacher_project.py").write_text(LAZY_PROJECT)
    text = LAZY.format(student=str(tmp_path / "student.yaml"), output=str(tmp_path / "inference"))
    (tmp_path / "run.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["--config-file", str(tmp_path / "run.py")]
    teacher = ["--teacher", str(tmp_path / "teacher.yaml"), "--teacher-weights", str(tmp_path / "teacher.pth")]
    command.main([*argv, *teacher])
    assert "bbox/AP50" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(argv)
    assert "the config has no teacher to evaluate: name one by --teacher" in capsys.readouterr().err


def test_a_training_evaluates_it_first(tmp_path):
    """It is logged once, and the training is bit for bit the one without."""
    opts = {"SOLVER__MAX_ITER": 2, "SOLVER__CHECKPOINT_PERIOD": 1}
    plain = cfg_with_test_set(tmp_path, "NST", **opts)
    evaluated = cfg_with_test_set(tmp_path, "NST", **opts, KD__TEACHER__EVALUATE=True, OUTPUT_DIR=str(tmp_path / "b"))
    train(plain)
    train(evaluated)
    logged = [json.loads(line) for line in (tmp_path / "b" / "metrics.json").read_text().splitlines()]
    assert "teacher/bbox/AP" in logged[0]
    checkpoints = [torch.load(tmp_path / folder / "model_final.pth", weights_only=False) for folder in ("out", "b")]
    assert not differing(checkpoints[0]["model"], checkpoints[1]["model"])


def run_training(cfg):
    train(cfg)


def test_two_ranks_evaluate_it_together(tmp_path):
    opts = {"SOLVER__MAX_ITER": 1, "KD__TEACHER__EVALUATE": True}
    cfg = cfg_with_test_set(tmp_path, "NST", **opts)
    on_two_ranks(tmp_path, run_training, cfg)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    alone = evaluate_teacher(cfg, build_student(cfg), build_teacher(cfg), Trainer)
    assert logged[0]["teacher/bbox/AP50"] == pytest.approx(alone["bbox"]["AP50"], abs=1e-3)
