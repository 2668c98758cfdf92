"""Every file in configs/Classification, and the two-stage quickstart, is loaded, built and run."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from kd_det import add_kd_config, student_cfg
from kd_det.losses import loss_class
from kd_det.student import student_class
from kd_det.weights.backbone_file import backbone_metadata, backbone_weights, check_normalisation, save_backbone
from tests.classification.tiny_classifier import images

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in (CONFIGS / "Classification").rglob("*.yaml") if not path.name.startswith("Base-"))
IMAGENET = [path for path in FILES if "ImageNet" in path.parts]


def load(path):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the teachers by name, in the form in which they come."""
    folder = tmp_path_factory.mktemp("teachers")

    def write(cfg):
        name = cfg.KD.TEACHER.CONFIG_FILE
        path = folder / (Path(name).stem + ".pth")
        if not path.exists():
            if name.startswith("timm://"):
                state = timm.create_model(name.partition("://")[2], pretrained=False).state_dict()
            elif name.startswith("torchvision://"):
                state = torchvision.models.get_model(name.partition("://")[2]).state_dict()
            else:
                state = build_model(load(name)).state_dict()
            torch.save(state, path)
        return str(path)

    return write


def test_one_pair_has_every_method():
    methods = {"soft_targets", "at", "nst", "ofd", "sp", "nst_soft_targets"}
    found = {
        folder.name: {path.stem for path in folder.glob("[!B]*.yaml")}
        for folder in CONFIGS.glob("Classification/ImageNet/*/")
    }
    others = dict.fromkeys(("R_50-R_34", "R_101-R_50", "R_50-MobileNetV2"), {"nst_soft_targets"})
    assert found == {"R_50-R_18": methods, **others}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS / "Classification")))
def test_each_config_trains_a_step(path, weights, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)  # teachers are named from there
    cfg = load(path)
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        cfg.KD.TEACHER.WEIGHTS = weights(cfg)
    model = build_model(cfg).train()
    with EventStorage(), torch.autocast("cpu", enabled=False):
        losses = model(images(2, size=64))
    names = {loss_class(name).name for name in cfg.KD.LOSSES}
    own = {"loss_cls"} if student_class(cfg).needs_labels else set()
    assert set(losses) == own | {f"loss_{name}" for name in names}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_the_first_stage_is_named_by_the_second():
    first, second = (load(CONFIGS / "Quickstart" / f"two_stage_{name}.yaml") for name in ("1_backbone", "2_detector"))
    assert second.MODEL.WEIGHTS == f"{first.OUTPUT_DIR}/backbone.pkl"


@pytest.mark.parametrize("name", ["backbone", "unlabelled"])
def test_two_stages_join_up(tmp_path, name):
    first = load(CONFIGS / "Quickstart" / f"two_stage_1_{name}.yaml")
    second = load(CONFIGS / "Quickstart" / "two_stage_2_detector.yaml")
    classifier, detector = (build_model(student_cfg(cfg)).eval() for cfg in (first, second))
    path = str(tmp_path / "backbone.pkl")
    save_backbone(path, backbone_weights(classifier), backbone_metadata(first))
    checkpointer = DetectionCheckpointer(detector)
    content = checkpointer._load_file(path)
    check_normalisation(content, second)
    found = checkpointer._load_model(content)
    assert found.unexpected_keys == [] and found.incorrect_shapes == []
    assert not [key for key in found.missing_keys if key.startswith("backbone.bottom_up.")]
    image = images(1, size=64)
    with torch.no_grad():
        expected = classifier.backbone(classifier.preprocess_image(image).tensor)
        features = detector.backbone.bottom_up(detector.preprocess_image(image).tensor)
    assert all(torch.equal(features[level], expected[level]) for level in ("res2", "res3", "res4", "res5"))


def test_output_folders_differ():
    folders = [load(path).OUTPUT_DIR for path in FILES]
    assert len(set(folders)) == len(folders)
