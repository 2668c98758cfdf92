import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from kd_det.classification.data import (
    check_classes,
    load_dataset,
    register_builtin,
    register_configured,
    register_image_folder,
)
from kd_det.classification.loader import MixingLoader, build_test_loader, build_train_loader
from kd_det.classification.mapper import build_mapper, build_transform
from kd_det.classification.trainer import ClassificationTrainer
from kd_det.data import DatasetError
from tests.classification.tiny_classifier import classifier_cfg, set_options, write_folder
from tests.tiny_run import train


@pytest.fixture
def folder(tmp_path):
    """A registered folder of four classes with three images each."""
    name = f"folder_{tmp_path.name}"
    register_image_folder(name, write_folder(tmp_path / "images"))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def truncate(path):
    path.write_bytes(path.read_bytes()[:60])


def test_a_folder_is_a_list_of_files_and_labels(folder, tmp_path):
    dicts = load_dataset([folder])
    assert MetadataCatalog.get(folder).classes == ["ant", "bee", "cat", "dog"]
    assert [x["label"] for x in dicts] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert dicts[4]["file_name"] == str(tmp_path / "images" / "bee" / "1.png")


def test_imagenet_layout_uses_torchvisions_names(tmp_path):
    write_folder(tmp_path / "imagenet" / "val", classes=("n01", "n02"))
    torch.save(({"n01": ("tench",), "n02": ("great white", "shark")}, []), tmp_path / "imagenet" / "meta.bin")
    name = f"imagenet_{tmp_path.name}"
    register_image_folder(name, str(tmp_path / "imagenet" / "val"))
    assert len(load_dataset([name])) == 6
    assert MetadataCatalog.get(name).classes == ["tench", "great white, shark"]


def test_builtin_names_say_how_to_make_the_digits():
    register_builtin()
    assert "make_offline_dataset.py" in MetadataCatalog.get("digits_crops_train").make_command
    assert {"digits_crops_val", "imagenet_train", "imagenet_val"} <= set(DatasetCatalog.list())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "No such file or directory"),
        (lambda root: root.mkdir(), "Couldn't find any class folder"),
        (lambda root: (root.mkdir(), (root / "a.jpg").touch()), "Couldn't find any class folder"),
        (lambda root: (write_folder(root), (root / "empty").mkdir()), "no valid file for the classes empty"),
    ],
)
def test_a_folder_that_is_no_image_set(tmp_path, make, message):
    make(tmp_path / "images")
    register_image_folder(f"bad_{tmp_path.name}", str(tmp_path / "images"), make_command="make it")
    with pytest.raises(DatasetError, match=message) as error:
        load_dataset([f"bad_{tmp_path.name}"])
    assert str(tmp_path / "images") in str(error.value) and "make it with: make it" in str(error.value)
    assert "\n" not in str(error.value)


def test_data_sets_that_are_not_there_or_not_for_classification(folder):
    register_builtin()
    with pytest.raises(DatasetError, match="Unknown data set 'digits_crop_train'. Did you mean 'digits_crops_train'"):
        load_dataset(["digits_crop_train"])
    with pytest.raises(DatasetError, match="'coco_2017_train' is not for classification; those are: .*digits_crops"):
        load_dataset(["coco_2017_train"])


def test_data_sets_with_other_classes_than_each_other_or_the_head(folder, tmp_path):
    register_image_folder(f"two_{tmp_path.name}", write_folder(tmp_path / "two", classes=("ant", "elk")))
    with pytest.raises(DatasetError, match="other classes: 4 and 2, only in one of them: bee, cat, dog, elk"):
        load_dataset([folder, f"two_{tmp_path.name}"])
    check_classes(classifier_cfg(), [folder])
    with pytest.raises(DatasetError, match=r"4 classes .labels 0..3. and CLASSIFICATION.NUM_CLASSES is 3"):
        check_classes(classifier_cfg(CLASSIFICATION__NUM_CLASSES=3), [folder])


def test_folders_of_the_config_are_registered_once(tmp_path):
    root, name = write_folder(tmp_path / "images"), f"configured_{tmp_path.name}"
    cfg = classifier_cfg(CLASSIFICATION__IMAGE_FOLDERS=[[name, root]])
    register_configured(cfg)
    register_configured(cfg)
    assert len(load_dataset([name])) == 12
    with pytest.raises(ValueError, match="is taken"):
        register_configured(classifier_cfg(CLASSIFICATION__IMAGE_FOLDERS=[[name, "elsewhere"]]))
    with pytest.raises(ValueError, match="pairs, found 'x'"):
        register_configured(classifier_cfg(CLASSIFICATION__IMAGE_FOLDERS=["x"]))


@pytest.mark.parametrize("order, first", [("RGB", 200), ("BGR", 50)])
def test_channels_are_in_the_order_of_the_config(order, first):
    cfg = classifier_cfg(INPUT__FORMAT=order)
    picture = Image.new("RGB", (50, 40), (200, 100, 50))
    for is_train in (True, False):
        image = build_transform(cfg, is_train)(picture)
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert image[:, 3, 4].tolist() == [first, 100, 250 - first]


def test_evaluation_takes_the_centre():
    cfg = classifier_cfg(CLASSIFICATION__AUG__TEST_RESIZE=40, CLASSIFICATION__AUG__TEST_SIZE=20)
    picture = Image.new("RGB", (80, 40))
    picture.paste((255, 255, 255), (30, 10, 50, 30))
    assert (build_transform(cfg, False)(picture) == 255).all()


def test_augmentations_are_those_of_the_config():
    opts = {"FLIP": 0.3, "COLOR_JITTER": (0.4, 0.3, 0.2, 0.1), "RAND_AUGMENT_OPS": 2, "RAND_AUGMENT_MAGNITUDE": 7}
    cfg = classifier_cfg(**{f"CLASSIFICATION__AUG__{key}": value for key, value in opts.items()})
    crop, flip, jitter, augment, _ = build_transform(cfg, True).transforms
    assert (tuple(crop.size), tuple(crop.scale)) == ((32, 32), (0.08, 1.0))
    assert (flip.p, tuple(jitter.brightness), tuple(jitter.hue)) == (0.3, (0.6, 1.4), (-0.1, 0.1))
    assert (augment.num_ops, augment.magnitude) == (2, 7)
    plain = [type(t).__name__ for t in build_transform(classifier_cfg(CLASSIFICATION__AUG__FLIP=0.0), True).transforms]
    assert plain == ["RandomResizedCrop", "PILToTensor"]


def test_wrong_values():
    with pytest.raises(ValueError, match="INPUT.FORMAT must be RGB or BGR for classification, found 'L'"):
        build_transform(classifier_cfg(INPUT__FORMAT="L"), True)
    with pytest.raises(ValueError, match="CORRUPT_IMAGES must be 'stop' or 'skip', found 'ignore'"):
        build_mapper(classifier_cfg(CLASSIFICATION__CORRUPT_IMAGES="ignore"), True)


def test_a_corrupt_image_stops_the_run(folder, tmp_path):
    truncate(tmp_path / "images" / "bee" / "1.png")
    cfg = classifier_cfg(DATASETS__TRAIN=(folder,), SOLVER__IMS_PER_BATCH=12)
    with pytest.raises(DatasetError, match=r"bee/1.png cannot be read .*CORRUPT_IMAGES 'skip'"):
        next(iter(build_train_loader(cfg)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_is_skipped_and_counted(folder, tmp_path, caplog, num_workers):
    truncate(tmp_path / "images" / "bee" / "1.png")
    (tmp_path / "images" / "cat" / "0.png").write_text("no image")
    cfg = classifier_cfg(
        DATASETS__TRAIN=(folder,),
        SOLVER__IMS_PER_BATCH=12,
        CLASSIFICATION__CORRUPT_IMAGES="skip",
        DATALOADER__NUM_WORKERS=num_workers,
    )
    mapper = build_mapper(cfg, True)
    with caplog.at_level(logging.WARNING):
        batch = next(iter(build_train_loader(cfg, mapper)))
    files = [x["file_name"] for x in batch]
    assert len(files) == 12 and not any(f.endswith(("bee/1.png", "cat/0.png")) for f in files)
    assert mapper.skipped >= 2
    if num_workers == 0:
        assert "bee/1.png cannot be read" in caplog.text and f"; {mapper.skipped} so far" in caplog.text


def test_evaluation_leaves_corrupt_images_out(folder, tmp_path):
    truncate(tmp_path / "images" / "bee" / "1.png")
    cfg = classifier_cfg(CLASSIFICATION__CORRUPT_IMAGES="skip", CLASSIFICATION__TEST_BATCH_SIZE=5)
    files = [x["file_name"] for batch in build_test_loader(cfg, folder) for x in batch]
    assert len(files) == len(set(files)) == 11


def test_persistent_workers_serve_all_evaluations(folder, tmp_path):
    options = {"DATASETS__TRAIN": (folder,), "DATASETS__TEST": (folder,), "OUTPUT_DIR": str(tmp_path / "out")}
    cfg = classifier_cfg(DATALOADER__NUM_WORKERS=1, CLASSIFICATION__PREFETCH_FACTOR=3, **options)
    loader = build_test_loader(cfg, folder)
    assert (loader.prefetch_factor, loader.persistent_workers) == (3, True)
    cfg.CLASSIFICATION.PERSISTENT_WORKERS = False
    assert not build_test_loader(cfg, folder).persistent_workers
    built = []

    class Counting(ClassificationTrainer):
        @classmethod
        def build_test_loader(cls, cfg, dataset_name):
            built.append(dataset_name)
            return super().build_test_loader(cfg, dataset_name)

    cfg.DATALOADER.NUM_WORKERS = 0
    set_options(cfg, {"SOLVER__MAX_ITER": 3, "TEST__EVAL_PERIOD": 1})
    train(cfg, trainer_class=Counting)
    assert built == [folder]


def mixed(cfg, start=0):
    loader = build_train_loader(cfg)
    assert isinstance(loader, MixingLoader)
    loader.load_state_dict({"seed": 5})
    loader.start_at(start)
    return iter(loader)


@pytest.mark.parametrize("kind", ["MIXUP", "CUTMIX"])
def test_mixed_images_have_mixed_labels(folder, kind):
    cfg = classifier_cfg(DATASETS__TRAIN=(folder,), SOLVER__IMS_PER_BATCH=6, **{f"CLASSIFICATION__AUG__{kind}": 1.0})
    cfg.CLASSIFICATION.AUG.FLIP = 0.0
    batch = next(mixed(cfg))
    cfg.CLASSIFICATION.AUG[kind] = 0.0
    plain = build_train_loader(cfg)
    plain.load_state_dict({"seed": 5})
    plain = next(iter(plain))
    rolled = [plain[-1], *plain[:-1]]  # torchvision mixes each image with the one before it
    triples = list(zip(batch, plain, rolled))
    share = next(new["label"][a["label"]].item() for new, a, b in triples if a["label"] != b["label"])
    assert 0 < share < 1
    for new, a, b in triples:
        expected = torch.zeros(4)
        expected[a["label"]] += share
        expected[b["label"]] += 1 - share
        assert torch.allclose(new["label"], expected)
        a, b, new = a["image"].float(), b["image"].float(), new["image"]
        if kind == "MIXUP":
            assert torch.allclose(new, share * a + (1 - share) * b, atol=1e-3)
        else:
            own = (new == a).all(dim=0)
            assert (own | (new == b).all(dim=0)).all()
            assert own.float().mean().item() == pytest.approx(share, abs=0.02)


def test_mixing_goes_on_where_it_was(folder):
    cfg = classifier_cfg(DATASETS__TRAIN=(folder,), CLASSIFICATION__AUG__MIXUP=0.4, CLASSIFICATION__AUG__CUTMIX=1.0)
    batches = mixed(cfg)
    third = [next(batches) for _ in range(3)][2]
    again = next(mixed(cfg, start=2))
    assert all(
        torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"]) for a, b in zip(third, again)
    )
