"""Every shipped detection config is loaded, built and trained for one step: shrunken, and at full width as `slow`."""

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
from kd_det.losses.build import loss_class
from kd_det.teachers.build import build_teacher_architecture, get_teacher_cfg
from tests.tiny import batch

ROOT = Path(__file__).parents[2] / "configs"
FOLDERS = ("COCO-Detection", "COCO-InstanceSegmentation", "COCO-Keypoints", "Misc", "PascalVOC-Detection")
FILES = sorted(str(p.relative_to(ROOT)) for folder in FOLDERS for p in (ROOT / folder).glob("*.yaml"))
RUNS = [f for f in FILES if "/Base" not in f]
LONGER = [f for f in RUNS if f.endswith("_3x.yaml")]
TEACHERS = [f for f in RUNS if "/teacher" in f]
STEPS = [f for f in RUNS if f not in LONGER + TEACHERS]

# What a test makes small; a part of it applies to the student, all of it to the teacher.
SMALL = [
    "MODEL.FPN.OUT_CHANNELS", 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 8,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8],
    "MODEL.RETINANET.NUM_CONVS", 1,
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


def load(name: str) -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    merge_config_file(cfg, str(ROOT / name))
    return cfg


def shrink(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    opts = list(SMALL)
    if cfg.MODEL.RESNETS.DEPTH > 34:
        opts += [*NARROW, "MODEL.RESNETS.WIDTH_PER_GROUP", 4]
    if cfg.MODEL.TIMM.NAME == "mobilenetv2_100":
        opts += ["MODEL.TIMM.NAME", "mobilenetv2_035"]
    merge_options(cfg, opts, where="test")
    groups = 2 if "X_101" in cfg.KD.TEACHER.CONFIG_FILE else 1
    cfg.KD.TEACHER.OPTS = [
        *cfg.KD.TEACHER.OPTS, *SMALL, *NARROW,
        "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NUM_GROUPS", groups, "MODEL.RESNETS.WIDTH_PER_GROUP", 4 // groups,
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
            centers = instances.gt_boxes.get_centers()[:, None].expand(-1, 17, -1)
            visible = torch.full((len(instances), 17, 1), 2.0)
            instances.gt_keypoints = Keypoints(torch.cat([centers, visible], dim=2))
    return inputs


def one_step(cfg: CfgNode, folder) -> dict:
    """The losses of one training step; the backbone gets a gradient."""
    merge_options(cfg, QUICK, where="test")
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        cfg.KD.TEACHER.WEIGHTS = teacher_weights(cfg, folder)
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
        assert losses[name] > 0, name
    assert any("cls" in name for name in set(losses) - expected)
    assert ("loss_mask" in losses) == cfg.MODEL.MASK_ON
    assert ("loss_keypoint" in losses) == cfg.MODEL.KEYPOINT_ON


def test_what_must_be_there():
    coco = [f.removeprefix("COCO-Detection/faster_rcnn_") for f in RUNS if f.startswith("COCO-Detection/faster")]
    pairs = (
        "R_50_from_R_101",
        "R_18_from_R_101",
        "R_34_from_R_101",
        "MobileNetV2_from_R_50",
        "R_50_from_X_101",
        "EfficientNet_Lite0_from_R_50",
    )
    methods = ("nst", "at", "ofd", "sp", "hint", "soft_target", "nst_soft_target")
    assert {f"{p}_{m}_{s}.yaml" for p in pairs for m in methods for s in ("1x", "3x")} <= set(coco)
    voc = {f.removeprefix("PascalVOC-Detection/faster_rcnn_") for f in RUNS if f.startswith("PascalVOC")}
    pairs = [f"{student}_from_{teacher}" for student in ("R_18", "MobileNetV2") for teacher in ("R_50", "R_101")]
    assert {f"{p}_{m}.yaml" for p in pairs for m in methods} <= voc and "R_18_C4_from_R_50_C4_nst.yaml" in voc
    assert all(len((ROOT / f).read_text().splitlines()) in range(3, 16) for f in RUNS)
    for kind in ("mask_rcnn", "keypoint_rcnn", "cascade_mask_rcnn", "retinanet"):
        assert all(any(f"/{kind}" in f and f"_{m}_" in f for f in RUNS) for m in ("nst", "ofd")), kind


@pytest.mark.parametrize("name", LONGER)
def test_longer_schedules_differ_in_nothing_else(name):
    short, long = load(name.replace("_3x", "_1x")), load(name)
    assert (long.SOLVER.STEPS, long.SOLVER.MAX_ITER) == ((210000, 250000), 270000)
    assert tuple(3 * step for step in short.SOLVER.STEPS) != long.SOLVER.STEPS  # Detectron2's 3x decays later
    long.SOLVER = short.SOLVER
    assert long == short


@pytest.mark.parametrize("name", STEPS)
def test_teacher_weights_are_known_without_a_file(name):
    cfg = load(name)
    weights = get_teacher_cfg(cfg).MODEL.WEIGHTS
    if cfg.KD.TEACHER.WEIGHTS:  # VOC's FPN teachers, which the zoo lacks
        assert name.startswith("PascalVOC") and weights.startswith("output/voc_R_")
    else:
        assert weights.startswith("https://dl.fbaipublicfiles.com/detectron2/") and weights.endswith(".pkl")


@pytest.mark.parametrize("name", STEPS + TEACHERS)
def test_one_training_step_of_a_shrunken_network(name, folder):
    cfg = shrink(load(name))
    check_losses(cfg, one_step(cfg, folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS + TEACHERS)
def test_one_training_step_at_full_width(name, folder):
    cfg = load(name)
    check_losses(cfg, one_step(cfg, folder))
