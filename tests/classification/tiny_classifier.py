"""Tiny real classifiers, and folders of images for them."""

import numpy as np
import timm
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from PIL import Image

from kd_det import add_kd_config
from tests.tiny import tiny_resnet

NUM_CLASSES = 4


@BACKBONE_REGISTRY.register()
def build_tiny_resnet_backbone(cfg, input_shape):
    return tiny_resnet(cfg)


def classifier_cfg(*, depth: int = 18, width: int = 4, **opts) -> CfgNode:
    """A tiny ImageClassifier. ``opts``: ``MODEL__DEVICE="cpu"`` style."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_list(
        [
            "MODEL.META_ARCHITECTURE", "ImageClassifier",
            "MODEL.DEVICE", "cpu",
            "MODEL.BACKBONE.NAME", "build_tiny_resnet_backbone",
            "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.RESNETS.DEPTH", depth,
            "MODEL.RESNETS.NORM", "BN",
            "MODEL.RESNETS.RES2_OUT_CHANNELS", width,
            "MODEL.PIXEL_STD", [57.0, 57.0, 57.0],
            "INPUT.FORMAT", "RGB",
            "CLASSIFICATION.NUM_CLASSES", NUM_CLASSES,
            "CLASSIFICATION.AUG.TRAIN_SIZE", 32,
            "CLASSIFICATION.AUG.TEST_RESIZE", 32,
            "CLASSIFICATION.AUG.TEST_SIZE", 32,
            "DATALOADER.NUM_WORKERS", 0,
            "SOLVER.IMS_PER_BATCH", 4,
        ]
    )  # fmt: skip
    set_options(cfg, opts)
    return cfg


def set_options(cfg: CfgNode, opts: dict) -> None:
    for key, value in opts.items():
        cfg.merge_from_list([key.replace("__", "."), value])


def distilled_cfg(tmp_path, *losses: str, teacher: CfgNode | None = None, **opts) -> CfgNode:
    """A tiny classifier with a tiny random teacher, which are written to ``tmp_path``; taps are the stages."""
    teacher = teacher or classifier_cfg(depth=50, width=8)
    torch.manual_seed(1)
    model = build_model(teacher).train()
    for _ in range(20):  # batch-norm statistics as a trained network has them
        model(images())
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    cfg = classifier_cfg(
        MODEL__META_ARCHITECTURE="Distiller",
        KD__STUDENT__META_ARCHITECTURE="ImageClassifier",
        KD__LOSSES=losses,
        KD__TEACHER__CONFIG_FILE=str(tmp_path / "teacher.yaml"),
        KD__TEACHER__WEIGHTS=str(tmp_path / "teacher.pth"),
        KD__SOFT_TARGET__STUDENT_TAPS=("linear",),
        KD__SIMILARITY__SAMPLES="images",
        KD__SIMILARITY__STUDENT_TAPS=("res5",),
        KD__NST__STUDENT_TAPS=("res4", "res5"),
        KD__AT__STUDENT_TAPS=("res3", "res4"),
        KD__HINT__STUDENT_TAPS=("res4",),
    )
    set_options(cfg, opts)
    return cfg


def images(count: int = 4, size: int = 32, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"image": torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8), "label": i % NUM_CLASSES}
        for i in range(count)
    ]


def write_folder(root, per_class: int = 3, classes=("ant", "bee", "cat", "dog"), size=(40, 36)) -> str:
    """An ImageFolder whose classes differ in colour: they can be learnt."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture = rng.integers(0, 60, (*size, 3), dtype=np.uint8)
            picture[..., label % 3] += np.uint8(60 + 60 * (label // 3))
            Image.fromarray(picture).save(root / name / f"{i}.png")
    return str(root)


def unlabelled_cfg(tmp_path, *losses: str, **opts) -> CfgNode:
    """A tiny BackboneOnly taught by the maps of a tiny random ViT, of stride 16; taps are its last map and res5."""
    if not (tmp_path / "vit.pth").exists():
        torch.manual_seed(1)
        torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    cfg = classifier_cfg(
        MODEL__META_ARCHITECTURE="Distiller",
        KD__STUDENT__META_ARCHITECTURE="BackboneOnly",
        KD__LOSSES=losses or ("FeatureDistillation",),
        KD__TEACHER__CONFIG_FILE="timm://test_vit",
        KD__TEACHER__WEIGHTS=str(tmp_path / "vit.pth"),
        KD__TEACHER__OPTS=["MODEL.TIMM.OPTS", ["dynamic_img_size", True]],
        KD__SIMILARITY__SAMPLES="images",
    )
    for name in ("HINT", "NST", "SIMILARITY"):
        set_options(cfg, {f"KD__{name}__STUDENT_TAPS": ("res5",), f"KD__{name}__TEACHER_TAPS": ("res4",)})
    set_options(cfg, opts)
    return cfg


def write_flat(root, count: int = 6, size=(40, 36)) -> str:
    """Images without classes, some of them in a folder of a folder."""
    rng = np.random.default_rng(0)
    (root / "deep" / "er").mkdir(parents=True)
    for i in range(count):
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / ("deep/er" if i % 3 == 0 else ".") / f"{i}.png")
    return str(root)
