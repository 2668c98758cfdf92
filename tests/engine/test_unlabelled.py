"""Runs with unlabelled images: what is loaded, exact resumption, results of another detector, and what is refused."""

import json
import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as masks

from kd_det.cli import argument_parser, check_run, load_config, parse_arguments
from kd_det.data.unlabelled import load_unlabelled, read_results, register_unlabelled, registered_unlabelled
from kd_det.engine.loader import build_train_loader
from kd_det.engine.unlabelled import unlabelled_dataset
from kd_det.errors import DatasetError
from tests.cli.test_bad_input import check, message_of
from tests.engine.test_distributed import on_two_ranks
from tests.engine.test_resume import load, other_folder, resume_from
from tests.tiny import KEYPOINT, MASK
from tests.tiny_run import differing, run_cfg, train

NAMES = ("unlabelled", "photographs")


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""
    yield
    for name in NAMES:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def write_images(folder, sizes=((48, 64), (64, 48), (48, 64), (64, 48), (56, 64))) -> str:
    """Images without annotations and their COCO json; returns its path. Ids are 100, 101, ..."""
    folder.mkdir(exist_ok=True)
    rng, images = np.random.default_rng(1), []
    for i, (height, width) in enumerate(sizes):
        cv2.imwrite(f"{folder}/{i}.png", rng.integers(256, size=(height, width, 3), dtype=np.uint8))
        images.append({"id": 100 + i, "file_name": f"{i}.png", "height": height, "width": width})
    (folder / "images.json").write_text(json.dumps({"images": images, "annotations": []}))
    return str(folder / "images.json")


def write_results(folder, detections=None, **changes) -> str:
    """COCO results: in each image one sure detection and one that is not; returns the path."""
    if detections is None:
        one = {"category_id": 1, "bbox": [4, 6, 20, 24]}
        detections = [{**one, "image_id": 100 + i, "score": s, **changes} for i in range(4) for s in (0.9, 0.2)]
    (folder / "results.json").write_text(json.dumps(detections))
    return str(folder / "results.json")


def unlabelled_cfg(tmp_path, *losses, **opts):
    images = write_images(tmp_path / "unlabelled")
    on = {"KD__UNLABELLED__RATIO": 1.0, "KD__UNLABELLED__DATASETS": [["unlabelled", images]]}
    return run_cfg(tmp_path, *losses, **{**on, "KD__UNLABELLED__THRESHOLD": 0.3, **opts})


def first_batches(cfg, count: int = 3) -> list:
    return [batch for batch, _ in zip(build_train_loader(cfg), range(count))]


# Data sets.


def test_a_folder_a_json_and_a_list_are_the_same_images(tmp_path):
    path = write_images(tmp_path / "images")
    (tmp_path / "list.txt").write_text("images/0.png\nimages/1.png\n\n")
    with pytest.raises(ValueError, match=r"holds names of data sets, or \[name, folder\]"):
        registered_unlabelled([["unlabelled"]], "KEY")
    found = {}
    for kind, source in {"folder": tmp_path / "images", "json": path, "list": tmp_path / "list.txt"}.items():
        for _ in range(2):  # again is no error
            assert registered_unlabelled([["unlabelled", str(source)]], "KEY") == ["unlabelled"]
        with pytest.raises(ValueError, match="KEY: the data set name 'unlabelled' is taken"):
            registered_unlabelled([["unlabelled", "elsewhere"]], "KEY")
        found[kind] = [(x["file_name"], x["height"], x["width"]) for x in load_unlabelled(["unlabelled"])]
        DatasetCatalog.remove("unlabelled")
        MetadataCatalog.remove("unlabelled")
    assert found["folder"] == found["json"] and found["list"] == found["json"][:2]


def test_turned_photographs(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    register_unlabelled("photographs", str(tmp_path))
    (record,) = load_unlabelled(["photographs"])
    assert (record["width"], record["height"]) == (20, 30)


def test_annotations_are_left_out(tmp_path):
    cfg = run_cfg(tmp_path)
    assert all(set(x) == {"file_name", "image_id", "height", "width"} for x in load_unlabelled(cfg.DATASETS.TRAIN))


# Batches.


def test_batches_have_both(tmp_path):
    cfg = unlabelled_cfg(tmp_path, KD__UNLABELLED__RATIO=2.0)
    for batch in first_batches(cfg):
        assert ["unlabelled" in x for x in batch] == [False] * 2 + [True] * 4
        assert all(("instances" in x) != ("unlabelled" in x) for x in batch)


def test_the_labelled_images_are_those_of_a_run_without(tmp_path):
    cfg = unlabelled_cfg(tmp_path)
    off = cfg.clone()
    off.KD.UNLABELLED.RATIO = 0.0
    batches = []
    for c in (cfg, off):
        np.random.seed(0)
        batches.append(first_batches(c))
    for ours, theirs in zip(*batches):
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(ours[:2], theirs, strict=True))


def test_results_move_with_the_image(tmp_path):
    cfg = unlabelled_cfg(tmp_path, KD__UNLABELLED__RESULTS=write_results(tmp_path), INPUT__RANDOM_FLIP="horizontal")
    assert [x["image_id"] for x in unlabelled_dataset(cfg)] == [100, 101, 102, 103]  # the fifth was not looked at
    seen = set()
    for batch in first_batches(cfg, 8):
        for x in batch[2:]:
            (box,) = x["instances"].gt_boxes.tensor
            scale, width = x["image"].shape[1] / x["height"], x["image"].shape[2]
            expected = torch.tensor([4.0, 6, 24, 30]) * scale
            flipped = torch.stack([width - expected[2], expected[1], width - expected[0], expected[3]])
            seen.add(bool(torch.allclose(box, expected, atol=1)))
            assert torch.allclose(box, expected, atol=1) or torch.allclose(box, flipped, atol=1)
            assert x["instances"].gt_classes.tolist() == [1]
    assert seen == {True, False}


def test_results_of_another_detectors_classes(tmp_path):
    cfg = unlabelled_cfg(tmp_path, KD__UNLABELLED__RESULTS=write_results(tmp_path, category_id=17))
    path = tmp_path / "unlabelled" / "images.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 17, "name": "2"}, {"id": 18, "name": "tree"}]
    path.write_text(json.dumps(content))
    assert [a["category_id"] for x in unlabelled_dataset(cfg) for a in x["annotations"]] == [2] * 4


def test_masks_and_keypoints_of_results(tmp_path):
    mask = masks.encode(np.asfortranarray(np.ones((48, 64), dtype=np.uint8)))
    mask["counts"] = mask["counts"].decode()
    detection = {"image_id": 100, "category_id": 1, "bbox": [4, 6, 20, 24], "score": 0.9}
    detection |= {"segmentation": mask, "keypoints": [5.0, 7.0, 0.3] * 5}
    opts = {"KD__UNLABELLED__RESULTS": write_results(tmp_path, [detection]), **MASK, **KEYPOINT}
    cfg = unlabelled_cfg(tmp_path, **opts)
    (record,) = unlabelled_dataset(cfg)
    assert record["annotations"][0]["keypoints"] == [5.0, 7.0, 2] * 5
    cfg.MODEL.KEYPOINT_ON = False  # the tiny data set has no keypoints, whose names a mapper wants
    loader = build_train_loader(cfg, dataset=[{**record, "annotations": []}] * 4)
    x = next(iter(loader))[2]
    assert x["instances"].gt_masks.tensor.all()


# Runs.


@pytest.mark.parametrize("results", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, results):
    losses = () if results else ("NST", "SoftTarget", "FGD")
    opts = {"KD__UNLABELLED__RESULTS": write_results(tmp_path)} if results else {"KD__NON_FINITE": "skip"}
    cfg = unlabelled_cfg(tmp_path, *losses, **opts)
    train(cfg)
    before = load(cfg.OUTPUT_DIR)
    resumed = resume_from(cfg, "model_0000001.pth", "resumed")
    resumed.DATALOADER.NUM_WORKERS = 2
    train(resumed, resume=True)
    assert differing(load(resumed.OUTPUT_DIR), before) == []
    off = other_folder(cfg, "off")
    off.KD.UNLABELLED.RATIO = 0.0
    train(off)
    assert differing(load(off.OUTPUT_DIR), before)


def test_precise_statistics_are_of_labelled_images(tmp_path):
    opts = {"TEST__PRECISE_BN__ENABLED": True, "TEST__PRECISE_BN__NUM_ITER": 2, "SOLVER__MAX_ITER": 2}
    cfg = unlabelled_cfg(tmp_path, "NST", **opts)
    first = train(cfg)
    seen = next(iter(first._loaders[1]))
    assert len(seen) == 2 and not any("unlabelled" in x for x in seen)


def test_a_run_that_loses_its_unlabelled_images_says_so(tmp_path, caplog):
    cfg = unlabelled_cfg(tmp_path, "NST")
    train(cfg)
    off = resume_from(cfg, "model_0000003.pth", "off")
    off.KD.UNLABELLED.RATIO = 0.0
    train(off, resume=True)
    assert "unlabelled_batch_size was 2, is 0" in caplog.text


def train_and_load(cfg):
    train(cfg)
    return load(cfg.OUTPUT_DIR)["model"]


def test_two_ranks(tmp_path):
    cfg = unlabelled_cfg(tmp_path, "NST", "SoftTarget", SOLVER__MAX_ITER=2)
    ours, theirs = on_two_ranks(tmp_path, train_and_load, cfg)
    assert differing(ours, theirs) == []


# What is refused.


def test_results_find_their_image_by_its_id(tmp_path):
    cfg = unlabelled_cfg(tmp_path, KD__UNLABELLED__RESULTS=write_results(tmp_path))
    images = str(tmp_path / "unlabelled" / "images.json")
    cfg.KD.UNLABELLED.DATASETS = [["unlabelled", images], ["photographs", images]]
    with pytest.raises(DatasetError, match="images of unlabelled, photographs share an id"):
        unlabelled_dataset(cfg)
    cfg.KD.UNLABELLED.RESULTS = ""
    assert len(unlabelled_dataset(cfg)) == 10


OTHER_IMAGES = {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9}
GOOD = {**OTHER_IMAGES, "image_id": 100}

RESULTS = {
    "no list": ({"annotations": [GOOD]}, "expected a list of COCO detections, found a dict with annotations"),
    "empty": ([], "expected a list of COCO detections, found nothing"),
    "no score": ([GOOD, {"image_id": 1, "category_id": 2, "bbox": []}], "detection 1: expected .* found image_id, cat"),
    "a number": ([3], "detection 0: expected image_id, category_id, bbox and score, found 3"),
    "image of a list": ([{**GOOD, "image_id": [1]}], r"expected a number or a name as image_id, found \[1\]"),
    "a short box": ([{**GOOD, "bbox": [1, 2, 3]}], r"detection 0: expected a bbox of x, y, width .* found \[1, 2, 3\]"),
    "a negative box": ([{**GOOD, "bbox": [1, 2, -3, 4]}], "expected a bbox"),
    "not finite": ([{**GOOD, "bbox": [1, 2, float("nan"), 4]}], "expected a bbox"),
    "score of a percentage": ([{**GOOD, "score": 90}], "expected a score in 0..1, found 90"),
    "class by name": ([{**GOOD, "category_id": "car"}], "expected a number as category_id, found 'car'"),
    "other images": ([OTHER_IMAGES], "of other images than unlabelled: they have the image ids 7, the data sets 100"),
    "other classes": ([{**GOOD, "category_id": 90}], "they have the ids 90, the student's are 0, 1, 2"),
    "nothing sure": ([{**GOOD, "score": 0.1}], "no detection of the student's classes with a score of 0.3"),
}


def write_run(tmp_path, **opts):
    cfg = unlabelled_cfg(tmp_path, "NST", **opts)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    return tmp_path


@pytest.mark.parametrize("case", RESULTS)
def test_results(tmp_path, case):
    detections, message = RESULTS[case]
    run = write_run(tmp_path, KD__UNLABELLED__RESULTS=write_results(tmp_path, detections))
    with pytest.raises(DatasetError, match=message):
        check(run)


def test_results_without_masks_for_a_student_of_masks(tmp_path):
    path = write_results(tmp_path, [{**GOOD, "segmentation": []}])
    with pytest.raises(DatasetError, match="detection 0: the student learns segmentation, and it has none"):
        read_results(path, {1: 1}, threshold=0.3, needs=["segmentation"])


OPTIONS = {
    "ratio": (["KD.UNLABELLED.RATIO", "0.3"], "RATIO 0.3 with 2 labelled images a process makes 0.6 unlabelled ones"),
    "negative ratio": (["KD.UNLABELLED.RATIO", "-1.0"], "KD.UNLABELLED.RATIO must be a finite number >= 0, found -1.0"),
    "infinite ratio": (["KD.UNLABELLED.RATIO", "1e999"], "KD.UNLABELLED.RATIO must be a finite number >= 0, found inf"),
    "no data set": (["KD.UNLABELLED.DATASETS", "[]"], "KD.UNLABELLED.DATASETS is empty: name a data set, or give a"),
    "unknown data set": (["KD.UNLABELLED.DATASETS", "['tyni']"], "Unknown data set 'tyni'. Did you mean 'tiny'"),
    "no folder": (["KD.UNLABELLED.DATASETS", "[['photographs','nowhere']]"], "expected a folder .* No such file"),
    "no results": (["KD.UNLABELLED.RESULTS", "nowhere.json"], "results 'nowhere.json' cannot be read: .*No such file"),
    "threshold": (["KD.UNLABELLED.THRESHOLD", "50.0"], "KD.UNLABELLED.THRESHOLD must be a score in 0..1, found 50.0"),
    "no loss": (["KD.UNLABELLED.WEIGHT", "0.0", "KD.LOSSES", "()"], "unlabelled images would teach nothing"),
    "no teacher": (["KD.TEACHER.CONFIG_FILE", "", "KD.LOSSES", "()"], "need a teacher that labels them"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(tmp_path, case):
    argv, message = OPTIONS[case]
    assert re.search(message, found := message_of(write_run(tmp_path), *argv)), found


def test_files(tmp_path):
    run = write_run(tmp_path)
    (tmp_path / "unlabelled" / "1.png").unlink()
    assert "'unlabelled': 1 of 5 images are missing, the first is" in message_of(run)
    (tmp_path / "unlabelled" / "images.json").write_text("[1, 2]")
    assert "expected a folder of images, a COCO json, or a file with a path a line" in message_of(run)


def test_a_plain_student_with_unlabelled_images_is_refused(tmp_path):
    run = write_run(tmp_path)
    assert "set MODEL.META_ARCHITECTURE 'Distiller'" in message_of(run, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")


def test_warnings(tmp_path):
    def warnings(*argv) -> str:
        args = parse_arguments(argument_parser(), ["--config-file", str(write_run(tmp_path) / "run.yaml"), *argv])
        check_run(load_config(args), args)
        return " ".join(args.warnings)

    assert warnings() == ""
    assert "'tiny' has 24 annotations, which are not used" in warnings("KD.UNLABELLED.DATASETS", "['tiny']")
    assert "KD.UNLABELLED.RATIO is 0.0: the unlabelled images are not used" in warnings("KD.UNLABELLED.RATIO", "0.0")
