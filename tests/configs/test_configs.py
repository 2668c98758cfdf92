"""
Every shipped detection config is loaded, built and trained for one step: shrunken, and at full width as `slow`.
Classifiers: tests/classification/test_configs.py. LazyConfigs: test_lazy_configs.py.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Keypoints
from PIL import Image

from kd_det import add_kd_config
from kd_det.config_file import merge_config_file, merge_options
from kd_det.features.classes import match_classes
from kd_det.losses.build import loss_class
from kd_det.teachers.build import OWN_AVERAGE, build_teacher_architecture, get_teacher_cfg
from kd_det.teachers.ensemble import planned_teachers
from tests.tiny import LOSSES, batch

ROOT = Path(__file__).parents[2] / "configs"
# Without the files of kd-det study: tests/cli/test_study.py.
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.yaml") if "\nrows:" not in path.read_text())
CLASSIFIERS = [f for f in FILES if f.startswith(("Classification/", "Quickstart/two_stage_1"))]
RUNS = [f for f in FILES if "Base-" not in f and f not in CLASSIFIERS]

# What a test makes small; a part of it applies to the student, all of it to the teacher.
SMALL = [
    "MODEL.FPN.OUT_CHANNELS", 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 8,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8],
    "MODEL.RETINANET.NUM_CONVS", 3,
]  # fmt: skip
NARROW = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8]  # cannot be
QUICK = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
    "MODEL.TIMM.WEIGHTS", "",
    "INPUT.MIN_SIZE_TEST", 64,
    "DATASETS.TRAIN", ("two_images",),
    "KD.OVERHAUL.CALIBRATION_IMAGES", 2,
]  # fmt: skip


_SAVED: dict = {}


@cache
def _load(name: str) -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    merge_config_file(cfg, str(ROOT / name))
    return cfg


def load(name: str) -> CfgNode:
    return _load(name).clone()


def shrink(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    opts = list(SMALL)
    if cfg.MODEL.RESNETS.DEPTH > 34:
        opts += [*NARROW, "MODEL.RESNETS.WIDTH_PER_GROUP", 4]
    if cfg.MODEL.TIMM.NAME == "mobilenetv2_100":
        opts += ["MODEL.TIMM.NAME", "mobilenetv2_035"]
    merge_options(cfg, opts, where="test")
    for teacher in (cfg.KD.TEACHER, *cfg.KD.TEACHERS):
        groups = 2 if "X_101" in teacher["CONFIG_FILE"] else 1
        if teacher["CONFIG_FILE"] != OWN_AVERAGE:
            r_18s = ("Quickstart/teacher.yaml", "Study/digits_teacher.yaml", "Study/cells_teacher_R_18.yaml")
            narrow = teacher["CONFIG_FILE"].endswith(r_18s)
            teacher["OPTS"] = [
                *teacher.get("OPTS", ()), *SMALL, *NARROW, "MODEL.RESNETS.DEPTH", 18 if narrow else 50,
                "MODEL.RESNETS.NUM_GROUPS", groups, "MODEL.RESNETS.WIDTH_PER_GROUP", 4 // groups,
            ]  # fmt: skip
    return cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of two images, for calibration."""
    folder = tmp_path_factory.mktemp("configs")
    records = []
    for i, size in enumerate(((64, 96, 3), (64, 64, 3))):
        Image.fromarray(np.random.RandomState(i).randint(256, size=size, dtype=np.uint8)).save(folder / f"{i}.png")
        annotation = {"bbox": [0, 0, 9, 9], "bbox_mode": 1, "category_id": 0}
        record = {"file_name": str(folder / f"{i}.png"), "height": size[0], "width": size[1], "image_id": i}
        records.append({**record, "annotations": [annotation]})
    DatasetCatalog.register("two_images", lambda: records)
    names = [str(i) for i in range(17)]
    MetadataCatalog.get("two_images").set(keypoint_names=names, keypoint_flip_map=[])
    yield folder
    DatasetCatalog.remove("two_images")
    MetadataCatalog.remove("two_images")
    _SAVED.clear()


def teacher_weights(cfg: CfgNode, folder) -> str:
    """Random weights of a teacher in a file, one for all configs that share it."""
    key = (cfg.KD.TEACHER.CONFIG_FILE, str(cfg.KD.TEACHER.OPTS))
    if key not in _SAVED:
        _SAVED[key] = str(folder / f"teacher{len(_SAVED)}.pth")
        torch.manual_seed(1)
        torch.save({"model": build_teacher_architecture(get_teacher_cfg(cfg)).state_dict()}, _SAVED[key])
    return _SAVED[key]


def training_batch(cfg: CfgNode):
    inputs = batch(((64, 96), (64, 64)))
    for x in inputs:
        instances, (height, width) = x["instances"], x["image"].shape[-2:]
        instances.gt_classes %= min(cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES)
        if cfg.MODEL.MASK_ON:
            masks = torch.zeros(len(instances), height, width, dtype=torch.bool)
            for mask, box in zip(masks, instances.gt_boxes.tensor.int().tolist()):
                mask[box[1] : box[3], box[0] : box[2]] = True
            instances.gt_masks = BitMasks(masks)
        if cfg.MODEL.KEYPOINT_ON:
            num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            centers = instances.gt_boxes.get_centers()[:, None].expand(-1, num_keypoints, -1)
            visible = torch.full((len(instances), num_keypoints, 1), 2.0)
            instances.gt_keypoints = Keypoints(torch.cat([centers, visible], dim=2))
    if cfg.KD.UNLABELLED.RATIO:
        inputs += [{"image": x["image"], "unlabelled": True} for x in batch(((64, 96), (64, 64)), seed=1)]
    return inputs


def one_step(cfg: CfgNode, folder) -> dict:
    """The losses of one training step; the backbone gets a gradient."""
    trained_on = cfg.DATASETS.TRAIN
    merge_options(cfg, QUICK, where="test")
    if cfg.KD.TEACHER.CLASS_MAP:  # by the names of data sets that are not read here, and of the zoo's own weights
        cfg.DATASETS.TRAIN = trained_on
        cfg.KD.TEACHER.CLASSES = MetadataCatalog.get("coco_2017_train").thing_classes
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        for plan, node in zip(planned_teachers(cfg), (cfg.KD.TEACHER, *cfg.KD.TEACHERS), strict=True):
            if node["CONFIG_FILE"] != OWN_AVERAGE:
                node["WEIGHTS"] = teacher_weights(plan.cfg, folder)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    losses = model(training_batch(cfg))
    sum(losses.values()).backward()
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "backbone" in name]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    return {name: value.item() for name, value in losses.items()}


def check_losses(cfg: CfgNode, losses: dict):
    expected = {f"loss_{loss_class(name).name}" for name in cfg.KD.LOSSES}
    assert expected <= set(losses)
    assert all(np.isfinite(value) for value in losses.values())
    for name in expected:
        # 0 where the student is better, and where the teacher begins as the student.
        may_be_0 = name == "loss_bounded_regression" or cfg.KD.TEACHER.CONFIG_FILE == OWN_AVERAGE
        assert losses[name] > 0 or may_be_0 and losses[name] > -1e-6, name
    assert any("cls" in name for name in set(losses) - expected)
    assert ("loss_cls_pseudo" in losses) == (cfg.KD.UNLABELLED.RATIO > 0)
    assert ("loss_mask" in losses) == cfg.MODEL.MASK_ON
    assert ("loss_keypoint" in losses) == cfg.MODEL.KEYPOINT_ON


@pytest.mark.parametrize("name", FILES)
def test_every_file_loads(name):
    cfg = load(name)
    weights = cfg.MODEL.WEIGHTS
    assert "Base-" in name or len((ROOT / name).read_text().splitlines()) <= 35
    if cfg.KD.TEACHER.CONFIG_FILE.startswith("timm://"):
        assert cfg.KD.TEACHER.CONFIG_FILE == get_teacher_cfg(cfg).MODEL.WEIGHTS
    elif cfg.KD.TEACHER.CONFIG_FILE not in ("", OWN_AVERAGE) and not cfg.KD.TEACHER.WEIGHTS:
        weights = get_teacher_cfg(cfg).MODEL.WEIGHTS
        assert weights.startswith("https://dl.fbaipublicfiles.com/detectron2/") and weights.endswith(".pkl")


def test_two_files_are_not_one_run():
    runs = {}
    for name in [f for f in FILES if "Base-" not in f]:
        cfg = load(name)
        cfg.OUTPUT_DIR = ""
        assert str(cfg) not in runs, f"{name} is the run of {runs[str(cfg)]}"
        runs[str(cfg)] = name


def test_a_coco_teacher_knows_every_class_of_voc():
    cfg = load("PascalVOC-Detection/faster_rcnn_R_18_from_COCO_R_101_nst_soft_target.yaml")
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes, get_teacher_cfg(cfg).KD.TEACHER.CLASSES
    options = {"student_classes": names[0], "teacher_classes": names[1], "class_map": cfg.KD.TEACHER.CLASS_MAP}
    match = match_classes(20, 80, **options)
    found = [names[1][i] for i in match.teacher[:-1]]
    assert len(found) == 20 and [found[names[0].index(x)] for x in ("sofa", "diningtable", "tvmonitor", "person")] == [
        "couch", "dining table", "tv", "person"
    ]  # fmt: skip


def test_each_method_has_a_config():
    used = {name for f in FILES for name in load(f).KD.LOSSES}
    assert used == set(LOSSES)


@pytest.mark.parametrize("name", RUNS)
def test_one_training_step_of_a_shrunken_network(name, folder):
    cfg = shrink(load(name))
    check_losses(cfg, one_step(cfg, folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_one_training_step_at_full_width(name, folder):
    cfg = load(name)
    check_losses(cfg, one_step(cfg, folder))
