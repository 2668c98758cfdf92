"""Whole training runs of the tiny detectors: a data set on disk, a config, a run in a process of its own."""

import json
import multiprocessing
import os

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from kd_det.engine import Trainer
from tests.tiny import NUM_CLASSES, distillation_cfg

# Every loss with state of its own (margins, connectors with and without norm) and every kind of reading.
ALL_LOSSES = ("NST", "SoftTarget", "AttentionTransfer", "Overhaul", "Similarity", "Hint")


def write_coco(folder, *, images: int = 8, sizes=((48, 64), (64, 48)), name: str = "tiny") -> str:
    """Noise with three boxes an image in COCO format under ``folder``, registered; returns its name."""
    rng = np.random.default_rng(0)
    os.makedirs(folder, exist_ok=True)
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in range(NUM_CLASSES)]}
    for i in range(images):
        height, width = sizes[i % len(sizes)]
        cv2.imwrite(f"{folder}/{i}.png", rng.integers(256, size=(height, width, 3), dtype=np.uint8))
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        for j in range(3):
            x, y, w, h = 2 + 5 * j, 3 + 4 * j, 12 + 6 * j, 10 + 8 * j
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "category_id": j % NUM_CLASSES}
            content["annotations"].append({"id": 3 * i + j, "image_id": i, **box})
    with open(f"{folder}/annotations.json", "w") as file:
        json.dump(content, file)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, f"{folder}/annotations.json", str(folder))
    return name


def run_cfg(tmp_path, *losses: str, **opts) -> CfgNode:
    """A distillation run of 6 steps of 2 images, with random flips and sizes; nothing is evaluated."""
    defaults = {
        "DATASETS__TRAIN": (write_coco(tmp_path / "images"),),
        "DATASETS__TEST": (),
        "DATALOADER__NUM_WORKERS": 0,
        "INPUT__MIN_SIZE_TRAIN": (48, 64),
        "INPUT__MIN_SIZE_TEST": 48,
        "SOLVER__IMS_PER_BATCH": 2,
        "SOLVER__MAX_ITER": 6,
        "SOLVER__STEPS": (3,),
        "SOLVER__WARMUP_ITERS": 2,
        "SOLVER__CHECKPOINT_PERIOD": 2,
        "SEED": 7,
        "KD__OVERHAUL__CALIBRATION_IMAGES": 4,
        "OUTPUT_DIR": str(tmp_path / "out"),
    }
    return distillation_cfg(tmp_path, *losses, **{**defaults, **opts})


def train(cfg: CfgNode, *, resume: bool = False, trainer_class=Trainer) -> Trainer:
    """What tools/train_net.py does with a config, without its log files."""
    from detectron2.utils.env import seed_all_rng

    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def in_process(target, *args, timeout: float = 300) -> int:
    """Call ``target(*args)`` in a forked process; returns its exit status, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{target.__name__} did not end within {timeout} s")
    return process.exitcode


def flat(value, prefix: str = "") -> dict:
    """Every number of a checkpoint by its path, the losses' own state included."""
    if isinstance(value, dict):
        items = list(value.items()) + list(getattr(value, "_metadata", {}).get("kd_det.losses", {}).items())
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    ret = {}
    for key, inner in items:
        ret.update(flat(inner, f"{prefix}/{key}"))
    return ret


def differing(a: dict, b: dict) -> list[str]:
    """The paths at which two checkpoints differ in any bit."""
    import torch

    a, b = flat(a), flat(b)
    same = {k for k in a if k in b and (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])}
    return sorted((set(a) | set(b)) - same)
