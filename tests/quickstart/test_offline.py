import dataclasses
import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.data.detection_utils import create_keypoint_hflip_indices, read_image
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as run_lengths
from torchvision.datasets import ImageFolder

from kd_det.cli import digits
from kd_det.data import DatasetError
from kd_det.quickstart import offline
from kd_det.quickstart.digits import load_sources, render_scene
from kd_det.quickstart.offline import OfflineDatasetOptions, make_offline_dataset
from tests.digits_data import OPTIONS

CLASSES = list("0123456789")
TINY = dataclasses.replace(OPTIONS, num_train=2, num_val=2, size=64, num_crops=10, num_val_crops=0)


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def boxes_of(record):
    return [
        (a["category_id"], *BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)) for a in record["annotations"]
    ]


@pytest.mark.parametrize("split", ["train", "val"])
def test_both_formats_hold_the_pictures_boxes(digits_root, split):
    coco = load_coco_json(
        str(digits_root / "coco" / f"instances_{split}.json"),
        str(digits_root / "JPEGImages"),
        f"direct_{split}",
    )
    voc = load_voc_instances(str(digits_root), split, CLASSES)
    assert len(coco) == len(voc) == {"train": 12, "val": 10}[split]
    assert MetadataCatalog.get(f"direct_{split}").thing_classes == CLASSES
    for index, (c, v) in enumerate(zip(coco, voc)):
        picture = render_scene(split, index, size=96, seed=0)
        expected = [(label, *box) for label, box in zip(picture.labels, picture.boxes.tolist())]
        assert boxes_of(c) == boxes_of(v) == expected
        assert c["file_name"] == v["file_name"] and (c["height"], c["width"]) == (96, 96)
        # JPEG at quality 95 changes the brightness little (and the noise's colours more).
        image = read_image(c["file_name"], format="BGR").mean(axis=2)
        assert np.abs(image - picture.image.mean(axis=2)).mean() < 4


def test_coco_fields(digits_root):
    coco = json.loads((digits_root / "coco" / "instances_train.json").read_text())
    assert [image["id"] for image in coco["images"]] == list(range(1, 13))
    assert [c["id"] for c in coco["categories"]] == list(range(1, 11))
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for a in coco["annotations"]:
        assert a["area"] == run_lengths.decode(a["segmentation"]).sum()
        assert 0 < a["area"] <= a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0


def test_detectron2s_mapper_reads_the_masks_and_the_outermost_points(digits_root):
    assert MetadataCatalog.get("tiny_coco_train").keypoint_names == ["top", "bottom", "left", "right"]
    options = {"use_keypoint": True, "use_instance_mask": True, "instance_mask_format": "bitmask"}
    flip_indices = create_keypoint_hflip_indices(["tiny_coco_train"])
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR", keypoint_hflip_indices=flip_indices, **options)
    for index, record in enumerate(DatasetCatalog.get("tiny_coco_train")):
        instances, picture = mapper(record)["instances"], render_scene("train", index, size=96, seed=0)
        assert np.array_equal(instances.gt_masks.tensor.numpy(), picture.visible)
        for mask, box, keypoints in zip(picture.visible, picture.boxes, instances.gt_keypoints.tensor.numpy()):
            x, y = (keypoints[:, :2] - 0.5).astype(int).T  # Detectron2 moves points to the centres of pixels
            assert mask[y, x].all() and (keypoints[:, 2] == 2).all()
            assert [x[2], y[0], x[3] + 1, y[1] + 1] == box.tolist()


def test_files_of_train_and_val_share_no_digit_and_no_region(digits_root):
    starts = {name: start for name, start, _ in load_sources("val").photos}
    digit_ids = {}
    for split in ("train", "val"):
        coco = json.loads((digits_root / "coco" / f"instances_{split}.json").read_text())
        digit_ids[split] = {a["digit_id"] for a in coco["annotations"]}
        for name, x0, _, side in (image["photo"] for image in coco["images"]):
            assert x0 >= starts[name] if split == "val" else x0 + side <= starts[name]
    assert not digit_ids["train"] & digit_ids["val"]


@pytest.mark.parametrize("kind, evaluator", [("coco", COCOEvaluator), ("voc", PascalVOCDetectionEvaluator)])
def test_the_truth_scores_100_in_detectron2s_evaluators(digits_root, tmp_path, kind, evaluator):
    name = f"tiny_{kind}_val"
    tasks = ("bbox", "segm", "keypoints") if kind == "coco" else ("bbox",)
    options = {"tasks": tasks, "distributed": False, "output_dir": str(tmp_path), "kpt_oks_sigmas": [0.1] * 4}
    evaluator = evaluator(name, **(options if kind == "coco" else {}))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        boxes = torch.tensor([box for _, *box in boxes_of(record)], dtype=torch.float32)
        instances = Instances((96, 96), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))
        instances.pred_classes = torch.tensor([label for label, *_ in boxes_of(record)])
        if kind == "coco":
            masks = [run_lengths.decode(a["segmentation"]) for a in record["annotations"]]
            instances.pred_masks = torch.tensor(np.array(masks), dtype=torch.bool)
            keypoints = torch.tensor([a["keypoints"] for a in record["annotations"]])
            instances.pred_keypoints = keypoints.reshape(len(boxes), 4, 3)
        evaluator.process([record], [{"instances": instances}])
    results = evaluator.evaluate()
    assert [results[task]["AP"] for task in tasks] == pytest.approx([100] * len(tasks))


def test_classification_is_an_image_folder_of_the_same_split(digits_root):
    for split, count in (("train", 20), ("val", 10)):
        folder = ImageFolder(digits_root / "classification" / split)
        assert folder.classes == CLASSES  # so that a class is the detector's
        assert np.bincount(folder.targets).tolist() == [count // 10] * 10
        assert {image.size for image, _ in folder} == {(32, 32)}


def test_the_same_options_give_the_same_bytes_and_a_count_changes_no_picture(digits_root, tmp_path):
    make_offline_dataset(tmp_path / "again", OPTIONS)
    assert content(tmp_path / "again") == content(digits_root)
    make_offline_dataset(tmp_path / "fewer", dataclasses.replace(OPTIONS, num_train=3, num_crops=10))
    fewer, all_files = content(tmp_path / "fewer"), content(digits_root)
    pictures = [f for f in fewer if f.endswith((".jpg", ".xml"))]
    assert len(pictures) == 2 * (3 + 10) + 10 + 10
    assert all(fewer[f] == all_files[f] for f in pictures)
    make_offline_dataset(tmp_path / "other", dataclasses.replace(OPTIONS, seed=1))
    other = content(tmp_path / "other")
    assert not any(other[f] == all_files[f] for f in other if f.endswith(".jpg"))


def test_a_finished_set_is_reused_and_nothing_else_is(tmp_path):
    root = tmp_path / "digits"
    assert make_offline_dataset(root, TINY)
    written = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert not make_offline_dataset(root, TINY)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == written
    other = dataclasses.replace(TINY, num_train=3)
    with pytest.raises(DatasetError, match=r"num_train 2 \(asked for: 3\).*--overwrite"):
        make_offline_dataset(root, other)
    os.remove(root / "JPEGImages" / "val_000001.jpg")
    with pytest.raises(DatasetError, match="damaged"):
        make_offline_dataset(root, TINY)
    assert make_offline_dataset(root, other, overwrite=True)
    assert len(list((root / "JPEGImages").iterdir())) == 5
    assert os.listdir(tmp_path) == ["digits"]


def test_an_older_version_is_made_anew_and_a_newer_one_is_not(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = tmp_path / "digits"
    make_offline_dataset(root, TINY)
    text = (root / "dataset.json").read_text()

    def of_version(version):
        (root / "dataset.json").write_text(text.replace(f'"version": {offline.VERSION}', f'"version": {version}'))

    of_version(1)  # before it had masks
    with pytest.raises(DatasetError, match="made with other options: num_train 2"):
        make_offline_dataset(root, dataclasses.replace(TINY, num_train=3))
    (root / "mine.txt").write_text("a user's")
    with pytest.raises(DatasetError, match="damaged"):
        make_offline_dataset(root, TINY)
    (root / "mine.txt").unlink()
    assert make_offline_dataset(root, TINY)
    assert "version 1 of these files, made anew" in caplog.text
    assert (root / "dataset.json").read_text() == text and os.listdir(tmp_path) == ["digits"]
    of_version(offline.VERSION + 1)
    with pytest.raises(DatasetError, match="a newer version of this tool .*--overwrite"):
        make_offline_dataset(root, TINY)


def test_a_strangers_folder_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(DatasetError, match="not a data set made by this tool"):
            make_offline_dataset(tmp_path / "photos", TINY, overwrite=overwrite)
    assert os.listdir(tmp_path / "photos") == ["mine.jpg"]
    (tmp_path / "empty").mkdir()
    assert make_offline_dataset(tmp_path / "empty", TINY)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(split, index, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(offline, "render_crop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_offline_dataset(tmp_path / "digits", TINY)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, value, expected",
    [("num_train", 1, 2), ("num_val", -3, 2), ("size", 63, 64), ("num_crops", 9, 10), ("num_val_crops", -1, 10),
     ("seed", -1, 0), ("crop_size", 0, 32)],
)  # fmt: skip
def test_options_out_of_range(name, value, expected):
    with pytest.raises(DatasetError, match=f"^{name}: expected {expected} or more, found {value}$"):
        OfflineDatasetOptions(**{name: value})


def test_the_smallest_pictures_can_be_drawn(tmp_path):
    options = OfflineDatasetOptions(num_train=60, num_val=2, size=64, num_crops=60, num_val_crops=0, crop_size=32)
    assert make_offline_dataset(tmp_path / "digits", options)


def test_tool(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging, "basicConfig", lambda **kwargs: None)
    monkeypatch.setattr(digits.signal, "signal", lambda *args: None)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    args = ["--num-train", "2", "--num-val", "2", "--size", "64", "--num-crops", "0", "--num-val-crops", "0"]
    digits.main(args)
    written, following = capsys.readouterr().out.splitlines()
    assert written == f"{tmp_path / 'digits'}: written" and f"DETECTRON2_DATASETS={tmp_path} kd-det train" in following
    assert read_image(str(tmp_path / "digits" / "JPEGImages" / "val_000001.jpg")).shape == (64, 64, 3)
    assert not (tmp_path / "digits" / "classification").exists()
    digits.main(args)
    assert "reused" in capsys.readouterr().out
    for argv, error in (
        ([*args, "--seed", "1"], "error: .*seed 0 .asked for: 1.*--overwrite"),
        (["--num-train", "0", "--overwrite"], "error: num_train: expected 2 or more, found 0"),
    ):
        with pytest.raises(SystemExit):
            digits.main(argv)
        assert re.search(error, capsys.readouterr().err)
