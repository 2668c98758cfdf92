"""The stage on two processes, and under autocast."""

import os

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from kd_det.classification.data import register_image_folder
from kd_det.classification.trainer import ClassificationTrainer
from kd_det.engine import evaluate
from kd_det.engine.average import AverageStatistics
from tests.classification.tiny_classifier import classifier_cfg, distilled_cfg, images, set_options, write_folder
from tests.engine.test_distributed import _in_fork, on_two_ranks, step
from tests.tiny_run import train


@pytest.fixture(autouse=True)
def storage():
    """Every process opens its own."""


CASES = {
    "GradientAttentionLoss": {},
    "FSPLoss": {},
    "SoftTargetLoss": {"CLASSIFICATION__LABEL_SMOOTHING": 0.1},
    "SimilarityLoss": {},
}


@pytest.mark.parametrize("loss", CASES)
def test_two_ranks_with_half_the_batch_are_one_with_the_whole(tmp_path, loss):
    cfg = distilled_cfg(tmp_path, loss, MODEL__RESNETS__NORM="FrozenBN", **CASES[loss])
    whole, halves = _in_fork(tmp_path, step, cfg, images()), on_two_ranks(tmp_path, step, cfg, images())
    for key, value in whole["losses"].items():
        mean = (halves[0]["losses"][key] + halves[1]["losses"][key]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-7)
    largest = float(max(g.abs().max() for g in whole["gradients"].values() if g is not None))
    for name, gradient in whole["gradients"].items():
        for half in halves:
            torch.testing.assert_close(half["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * largest)


def run(cfg) -> dict:
    trainer = train(cfg, trainer_class=ClassificationTrainer)
    average = trainer.average.state_dict()["averages"] if trainer.average is not None else {}
    return {
        "weights": trainer.model.module.state_dict(),
        "average": average,
        "top1": getattr(trainer, "_last_eval_results", {}).get("classification", {}).get("top1"),
    }


def test_a_run_on_two_ranks(tmp_path):
    name = f"ranks_{tmp_path.name}"
    register_image_folder(name, write_folder(tmp_path / "images"))  # 12 images
    cfg = distilled_cfg(tmp_path, "NSTLoss", "SoftTargetLoss", "GradientAttentionLoss")
    options = {
        "DATASETS__TRAIN": (name,),
        "DATASETS__TEST": (name,),
        "CLASSIFICATION__AUG__CUTMIX": 1.0,
        "CLASSIFICATION__EMA_DECAY": 0.5,
        "CLASSIFICATION__TEST_BATCH_SIZE": 5,
        "SOLVER__MAX_ITER": 3,
        "SEED": 1,
        "OUTPUT_DIR": str(tmp_path / "out"),
    }
    set_options(cfg, options)
    first, second = on_two_ranks(tmp_path, run, cfg)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    for key, value in first["weights"].items():  # D28: the running statistics of batch norms among them
        assert torch.equal(value, second["weights"][key]), key
    for key, value in first["average"].items():
        assert torch.equal(value, second["average"][key]), key
    assert os.path.isfile(tmp_path / "out" / "backbone.pkl")
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(saved[key], value) for key, value in first["weights"].items())


def test_statistics_of_two_ranks_are_their_mean(tmp_path):
    """D28: each rank's batch norms saw other images."""
    name = f"ranks_{tmp_path.name}"
    register_image_folder(name, write_folder(tmp_path / "images"))
    options = {"DATASETS__TRAIN": (name,), "DATASETS__TEST": (name,), "SOLVER__MAX_ITER": 1, "SEED": 1}
    apart = classifier_cfg(**options, OUTPUT_DIR=str(tmp_path / "apart"))
    mean = classifier_cfg(**options, OUTPUT_DIR=str(tmp_path / "mean"))
    own = [x["weights"] for x in on_two_ranks(tmp_path, run_without_mean, apart)]
    first, second = on_two_ranks(tmp_path, run, mean)
    statistics = [key for key in own[0] if "running_" in key]
    assert any(not torch.equal(own[0][key], own[1][key]) for key in statistics)
    for key in statistics:
        torch.testing.assert_close(first["weights"][key], (own[0][key] + own[1][key]) / 2)
    # What was logged is the accuracy of what was saved.
    mean.MODEL.WEIGHTS = str(tmp_path / "mean" / "model_final.pth")
    assert evaluate(mean, ClassificationTrainer)["classification"]["top1"] == first["top1"]
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def run_without_mean(cfg) -> dict:
    AverageStatistics.after_step = lambda self: None
    return run(cfg)


LOSSES = ("NSTLoss", "AttentionTransferLoss", "OverhaulLoss", "SimilarityLoss", "HintLoss", "SoftTargetLoss", "FSPLoss")


def test_autocast_changes_roundings_only(tmp_path):
    cfg = distilled_cfg(tmp_path, *LOSSES)
    model = build_model(cfg).train()
    model(images())  # calibrates the margins
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    expected = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images())
    sum(found.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert set(found) == set(expected) and all(loss.dtype == torch.float32 for loss in found.values())
    assert all(found[key].item() != value.item() for key, value in expected.items())
    for key, value in expected.items():
        # bfloat16 has 8 bits; the losses are sums of differences of what is computed in it
        assert found[key].item() == pytest.approx(value.item(), rel=0.15), key
