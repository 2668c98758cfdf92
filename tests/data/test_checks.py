import json
import os
import pickle
import shutil

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from PIL import Image

from kd_det.data import CheckedMapper, DatasetError, DatasetSummary, check_dataset, check_voc_evaluation, checks
from kd_det.quickstart.register import register_builtin
from tests.digits_data import register


@pytest.fixture
def copy(digits_root, tmp_path):
    """A copy of the data set to break, registered as copy_*."""
    register(shutil.copytree(digits_root, tmp_path / "digits"), "copy")
    return tmp_path / "digits"


def error_of(name):
    with pytest.raises(DatasetError) as info:
        check_dataset(name)
    message = str(info.value)
    assert "\n" not in message and name in message
    return message


def test_registered_lazily_and_with_an_evaluator():
    register_builtin()
    register_builtin()  # names that are taken are left alone
    for split in ("train", "val"):
        coco, voc = (MetadataCatalog.get(f"digits_{kind}_{split}") for kind in ("coco", "voc"))
        assert coco.evaluator_type == "coco" and voc.evaluator_type == "pascal_voc"
        assert coco.thing_classes == voc.thing_classes == list("0123456789")
        assert coco.image_root == os.path.join(voc.dirname, "JPEGImages")
        assert voc.split == split and {coco.name, voc.name} <= set(DatasetCatalog)


def test_a_good_data_set(digits_root):
    for kind in ("coco", "voc"):
        summary = check_dataset(f"tiny_{kind}_train")
        assert (summary.num_images, summary.thing_classes) == (12, tuple("0123456789"))
    coco = json.loads((digits_root / "coco" / "instances_train.json").read_text())
    assert summary.num_instances == len(coco["annotations"])


def test_unknown_name_lists_the_nearest():
    register_builtin()
    message = error_of("digits_coco_trian")
    assert message.startswith("Unknown data set 'digits_coco_trian'. Did you mean 'digits_coco_train'?")


@pytest.mark.parametrize("kind, file", [("coco", "coco/instances_val.json"), ("voc", "ImageSets/Main/val.txt")])
def test_a_data_set_that_is_not_there(tmp_path, kind, file):
    register(tmp_path / "no such folder", "absent")
    message = error_of(f"absent_{kind}_val")
    assert str(tmp_path / "no such folder" / file) in message
    assert message.endswith(f"make it with: python tools/make_offline_dataset.py --output "
                            f"'{tmp_path}/no such folder'")  # fmt: skip


def test_detectron2s_own_data_set_that_is_not_there(tmp_path, monkeypatch):
    name = "coco_2017_val_100"
    meta = MetadataCatalog.get(name)
    monkeypatch.setenv("DETECTRON2_DATASETS", meta.json_file.split("/coco/annotations")[0])
    monkeypatch.chdir(tmp_path)
    message = error_of(name)
    assert meta.json_file in message and "$DETECTRON2_DATASETS" in message


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_truncated_json(copy):
    truncate(copy / "coco" / "instances_train.json")
    message = error_of("copy_coco_train")
    assert f"{copy}/coco/instances_train.json is not a readable JSON file" in message and "--overwrite" in message


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda coco: coco["annotations"][0].update(category_id=11), "category_id=11"),
        (
            lambda coco: coco["annotations"][0].update(bbox=[1, 2, 3]),
            r"box of 4 finite numbers, found \[1, 2, 3\]",
        ),
        (lambda coco: coco["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "found .*nan"),
        (lambda coco: coco["annotations"][0].update(bbox=[1, 2, 3, "4"]), "box of 4 finite numbers"),
        (lambda coco: coco["annotations"][1].update(id=1), "not unique"),
        (lambda coco: coco.pop("categories"), "KeyError: 'categories'"),
        (lambda coco: coco["images"].clear(), "holds no images .*instances_train.json"),
        (lambda coco: coco["images"][0].update(height=95), "cannot be read .*[Mm]ismatch"),
    ],
)
def test_wrong_coco_annotations(copy, change, expected):
    path = copy / "coco" / "instances_train.json"
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))
    with pytest.raises(DatasetError, match=expected):
        check_dataset("copy_coco_train")


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda xml: xml[: len(xml) // 2], "is not a readable XML file"),
        (
            lambda xml: xml.replace("<xmin>", "<xmin>left"),
            r"expected a number at object\[1\]/bndbox/xmin, found 'left",
        ),
        (lambda xml: xml.replace("<height>96</height>", ""), "expected a number at size/height, found None"),
        (
            lambda xml: xml.replace("<name>", "<name>x"),
            "Unknown class 'x3'. Did you mean '3'",
        ),
    ],
)
def test_wrong_voc_annotations(copy, change, expected):
    path = copy / "Annotations" / "val_000003.xml"
    path.write_text(change(path.read_text()))
    with pytest.raises(DatasetError, match=f"{path}:? {expected}"):
        check_dataset("copy_voc_val")


def test_a_voc_annotation_that_is_missing(copy):
    (copy / "Annotations" / "val_000003.xml").unlink()
    assert f"{copy}/Annotations/val_000003.xml: No such file" in error_of("copy_voc_val")


def test_a_voc_set_of_one_image(copy):
    (copy / "ImageSets" / "Main" / "val.txt").write_text("val_000000\n")
    assert "lists one image" in error_of("copy_voc_val")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"val_000000  1\nval_000001 -1\n", "expected the name of one image a line, found 'val_000000  1'"),
        (b"\xff\xfe", "is not a text file"),
    ],
)
def test_a_voc_split_that_is_no_list_of_images(copy, content, expected):
    path = copy / "ImageSets" / "Main" / "val.txt"
    path.write_bytes(content)
    assert expected in error_of("copy_voc_val") and str(path) in error_of("copy_voc_val")


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("<difficult>0</difficult>", "", r"expected an integer at object\[1\]/difficult, found None"),
        ("</xmin>", ".5</xmin>", r"expected an integer at object\[1\]/bndbox/xmin, found '\d+.5'"),
        ("<pose>Unspecified</pose>", "", r"object\[1\] has no pose"),
    ],
)
def test_what_only_the_evaluator_of_voc_wants(copy, old, new, expected):
    """Its loader does without, and its evaluator would fail after training."""
    check_voc_evaluation("copy_voc_val")
    path = copy / "Annotations" / "val_000003.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert check_dataset("copy_voc_val").num_images == 10
    with pytest.raises(DatasetError, match=f"'copy_voc_val' cannot be evaluated: {path}: .*{expected}"):
        check_voc_evaluation("copy_voc_val")


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_missing_images_are_counted(copy, kind):
    for index in (4, 7):
        (copy / "JPEGImages" / f"train_{index:06d}.jpg").unlink()
    message = error_of(f"copy_{kind}_train")
    assert f"2 of 12 images are missing, the first is {copy}/JPEGImages/train_000004.jpg" in message
    assert "make_offline_dataset.py" in message


def test_unreadable_images(copy):
    path = copy / "JPEGImages" / "train_000011.jpg"
    truncate(path)
    assert f"image {path} cannot be read (" in error_of("copy_coco_train")
    path.write_text("not an image")
    assert f"image {path} cannot be read (" in error_of("copy_voc_train")


def test_a_large_set_is_sampled_evenly(copy, monkeypatch):
    read = []
    reader = checks.read_image
    monkeypatch.setattr(checks, "read_image", lambda path, format: read.append(path) or reader(path, format=format))
    check_dataset("copy_coco_train")
    assert len(read) == 12
    read.clear()
    monkeypatch.setattr(checks, "READ_ALL_BELOW", 1000)
    monkeypatch.setattr(checks, "SAMPLE", 4)
    check_dataset("copy_coco_train")
    assert [os.path.basename(path) for path in read] == [f"train_{i:06d}.jpg" for i in (0, 3, 6, 9)]


def test_a_users_own_data_set(tmp_path):
    """Neither COCO nor VOC: whatever its function returns or raises is looked at."""
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "height": 4, "width": 6, "image_id": 0}
    record["annotations"] = [{"bbox": [0, 0, 2, 2], "bbox_mode": 0, "category_id": 3}]

    def broken():
        raise RuntimeError("no\nluck")

    for name, function in (("own", lambda: [record]), ("broken", broken), ("none", list)):
        DatasetCatalog.pop(name, None)
        DatasetCatalog.register(name, function)
    expected = {"num_images": 1, "num_annotations": 1, "num_instances": 1, "largest_class": 3}
    assert check_dataset("own") == DatasetSummary(**expected)
    MetadataCatalog.get("own").thing_classes = ["x", "y", "z"]
    assert "expected a class in 0..2, found 3" in error_of("own")
    MetadataCatalog.pop("own")
    assert error_of("broken").endswith("RuntimeError: no luck")
    assert "holds no images" in error_of("none")


def test_checked_mapper_names_the_file(copy):
    cfg = get_cfg()
    mapper = CheckedMapper(DatasetMapper(cfg, False))
    record = DatasetCatalog.get("copy_coco_val")[0]
    assert mapper(record)["image"].shape[0] == 3
    truncate(copy / "JPEGImages" / "val_000000.jpg")
    with pytest.raises(DatasetError, match=f"image {record['file_name']} cannot be read .*truncated"):
        mapper(record)
    # A worker process sends it to the training process by pickling, a class and one message.
    error = pickle.loads(pickle.dumps(DatasetError("one line")))
    assert type(error) is DatasetError and str(error) == "one line"
