"""Every file in configs/Classification, and the two-stage quickstart, is loaded, built and run."""

from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from kd_det import add_kd_config
from kd_det.losses import loss_class
from tests.classification.tiny_classifier import images

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(
    path
    for path in (CONFIGS / "Classification").rglob("*.yaml")
    if not path.name.startswith("Base-")
)
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
            if name.startswith("torchvision://"):
                state = torchvision.models.get_model(name.partition("://")[2]).state_dict()
            else:
                state = build_model(load(name)).state_dict()
            torch.save(state, path)
        return str(path)

    return write


def test_every_student_has_every_method():
    methods = {"soft_targets", "at", "nst", "ofd", "sp", "nst_soft_targets"}
    found = {folder.name: {path.stem for path in folder.glob("[!B]*.yaml")} for folder in CONFIGS.glob("Classification/ImageNet/*/")}
    assert found == {name: methods for name in ("R_50-R_18", "R_50-R_34", "R_101-R_50", "R_50-MobileNetV2")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS / "Classification")))
def test_each_config_trains_a_step(path, weights, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)  # teachers are named from there
    cfg = load(path)
    assert len(path.read_text().splitlines()) <= 20
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        cfg.KD.TEACHER.WEIGHTS = weights(cfg)
    model = build_model(cfg).train()
    if cfg.KD.LOSSES:
        model._calibration_batches = None  # the step's own images
    with EventStorage(), torch.autocast("cpu", enabled=False):
        losses = model(images(2, size=64))
    names = {loss_class(name).name for name in cfg.KD.LOSSES}
    assert set(losses) == {"loss_cls"} | {f"loss_{name}" for name in names}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_output_folders_differ():
    folders = [load(path).OUTPUT_DIR for path in FILES]
    assert len(set(folders)) == len(folders)
