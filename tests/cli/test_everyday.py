"""Everyday data and config that e7565a7 refused, or let fail after training (D4 to D11, D48)."""

import json
import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.cli import argument_parser, check_run, load_config, parse_arguments
from kd_det.engine import Trainer, evaluate
from kd_det.engine.evaluation import COCOEvaluator
from tests.tiny_run import run_cfg, train


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


@pytest.fixture
def run(tmp_path):
    cfg = run_cfg(tmp_path, SOLVER__MAX_ITER=1)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    (tmp_path / "run.yaml").write_text(cfg.dump())
    yield tmp_path
    for name in ("mine", "background"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def check(run, *opts):
    """The config of the run, and the warnings of its checks."""
    args = parse_arguments(argument_parser(), ["--config-file", str(run / "run.yaml"), *opts])
    return check_run(load_config(args), args), args.warnings


def message_of(run, *opts) -> str:
    with pytest.raises(ValueError) as e:
        check(run, *opts)
    assert "\n" not in str(e.value) and not (run / "out").exists()
    return str(e.value)


def change(run, edit):
    path = run / "images" / "annotations.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def register(name, *, drop=(), annotations=True, **metadata):
    """The images of the run as dataset dicts of a project's own."""
    records = DatasetCatalog.get("tiny")
    for record in records:
        if not annotations:
            record["annotations"] = []
        for item in (record, *record["annotations"]):
            for key in drop:
                item.pop(key, None)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**metadata)


def sets(train, test="('tiny',)"):
    return "DATASETS.TRAIN", train, "DATASETS.TEST", test


CLASSES = ["0", "1", "2"]


def test_a_data_set_without_evaluator_type_is_evaluated_as_coco(run):
    """D4: the tool refused what its own Trainer evaluates."""
    register("mine", thing_classes=CLASSES)
    both = sets("('mine',)", "('mine',)")
    cfg, _ = check(run, *both)
    names = MetadataCatalog.get("mine").thing_classes
    MetadataCatalog.remove("mine")
    assert "'mine' cannot be evaluated: its metadata lacks thing_classes" in message_of(run, *both)
    MetadataCatalog.get("mine").set(thing_classes=names)
    assert isinstance(Trainer.build_evaluator(cfg, "mine"), COCOEvaluator)


def test_a_set_of_background_beside_one_with_boxes(run):
    """D5: one of the training sets may be background alone."""
    register("background", annotations=False, thing_classes=CLASSES)
    _, warnings = check(run, *sets("('tiny','background')"), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False")
    assert not warnings
    _, (warning,) = check(run, *sets("('tiny','background')"))
    assert "'background' has no annotation to train on, and its images are left out" in warning
    assert "8 images and no annotation" in message_of(run, *sets("('background',)"))


def test_crowds_alone_cannot_be_trained_on(run):
    """D6: training drops crowds."""
    change(run, lambda content: [box.update(iscrowd=1) for box in content["annotations"]])
    assert "no annotation to train on: all 24 are crowds (iscrowd 1)" in message_of(run)


def ap_of(run) -> float:
    """Of one perfect detection an image, of its first object; of three objects, a third is found: AP is about 33."""
    evaluator = COCOEvaluator("tiny", tasks=("bbox",), output_dir=str(run / "inference"))
    evaluator.reset()
    for record in DatasetCatalog.get("tiny"):
        box = record["annotations"][0]
        instances = {"bbox": box["bbox"], "category_id": box["category_id"], "score": 0.9}
        prediction = {"image_id": record["image_id"], "instances": [{"image_id": record["image_id"], **instances}]}
        evaluator._predictions.append(prediction)
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        # D7: exports of labelling tools leave these out; pycocotools needs them.
        lambda content: [box.pop(key) for box in content["annotations"] for key in ("area", "iscrowd")],
        # D8: faster-coco-eval takes numbers for ids only.
        lambda content: (
            [image.update(id=f"image {image['id']}") for image in content["images"]],
            [box.update(image_id=f"image {box['image_id']}", id=f"box {box['id']}") for box in content["annotations"]],
        ),
    ],
)
def test_annotations_of_other_tools_are_evaluated(run, monkeypatch, edit, fast):
    if fast:
        pytest.importorskip("faster_coco_eval")
    else:
        monkeypatch.setattr("kd_det.engine.evaluation._is_installed", lambda: False)
    change(run, lambda content: [box.update(id=box["id"] + 1) for box in content["annotations"]])
    expected = ap_of(run)
    assert expected > 30
    change(run, edit)
    check(run)
    assert ap_of(run) == pytest.approx(expected)


@pytest.mark.parametrize(
    "key,message",
    [
        ("image_id", "evaluation needs an 'image_id', the image has file_name"),
        ("bbox_mode", "expected a 'bbox_mode' such as BoxMode.XYXY_ABS with each box, found None"),
        ("category_id", "expected a class in 0..2, found None"),
    ],
)
def test_dataset_dicts_that_lack_what_is_read_later(run, key, message):
    """D9: a KeyError at step 0 or after training."""
    register("mine", drop=[key], thing_classes=CLASSES)
    assert message in message_of(run, *sets("('mine',)", "('mine',)"))
    if key == "image_id":
        check(run, *sets("('mine',)", "()"))  # only evaluation reads it


KEYPOINTS = ("MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "5")


def test_keypoints_of_ones_own(run):
    """D10: sigmas are passed on; without them, one line before training."""
    points = [x for _ in range(5) for x in (10, 10, 2)]
    change(run, lambda content: [b.update(keypoints=points, num_keypoints=5) for b in content["annotations"]])
    names = [f"point {i}" for i in range(5)]
    MetadataCatalog.get("tiny").set(keypoint_names=names, keypoint_flip_map=[])
    small = (
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", "7",
    )  # fmt: skip
    assert "TEST.KEYPOINT_OKS_SIGMAS has 0 numbers, and evaluation needs one for each of the 5" in message_of(
        run, *KEYPOINTS, *small
    )
    assert "'tiny' has 5 keypoints an object and MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 4" in message_of(
        run, *KEYPOINTS[:3], "4", *small
    )
    sigmas = "[0.1, 0.2, 0.3, 0.4, 0.5]"
    cfg, _ = check(run, *KEYPOINTS, *small, "TEST.KEYPOINT_OKS_SIGMAS", sigmas)
    assert list(Trainer.build_evaluator(cfg, "tiny")._kpt_oks_sigmas) == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_boxes_beyond_their_image_and_empty_ones_are_counted(run):
    """D48."""

    def edit(content):
        content["annotations"][4]["bbox"] = [60, 10, 30, 10]
        content["annotations"][5]["bbox"] = [5, 5, 0, 8]

    change(run, edit)
    _, (warning,) = check(run)
    assert "2 of 24 boxes reach beyond their image or are empty, the first is annotation 1 of" in warning
    assert re.search(r"1\.png: x 60 to 90, y 10 to 20 in 48 x 64", warning)


def test_test_time_augmentation(run):
    """D11: TEST.AUG.ENABLED was accepted and ignored."""
    cfg, _ = check(run, "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48,)")
    trainer = train(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = "GeneralizedRCNN", f"{cfg.OUTPUT_DIR}/model_final.pth"
    results = evaluate(cfg, type(trainer))
    assert set(results) == {"bbox", "bbox_TTA"}
    refused = ("--overwrite", "TEST.AUG.ENABLED", "True", "KD.STUDENT.META_ARCHITECTURE", "ProposalNetwork")
    with pytest.raises(ValueError, match="augmentation for GeneralizedRCNN, the student is ProposalNetwork"):
        check(run, *refused)
