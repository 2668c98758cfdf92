import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from kd_det import student_cfg
from kd_det.classification.data import register_image_folder
from kd_det.classification.trainer import ClassificationTrainer, check_trainer
from kd_det.cli import pretrain, weights
from kd_det.engine import Trainer, evaluate
from kd_det.weights.backbone_file import check_normalisation
from tests.classification.tiny_classifier import classifier_cfg, distilled_cfg, images, set_options, write_folder
from tests.tiny import tiny_cfg
from tests.tiny_run import differing, train


@pytest.fixture
def folder(tmp_path):
    name = f"run_{tmp_path.name}"
    register_image_folder(name, write_folder(tmp_path / "images"))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def run_cfg(tmp_path, folder, *losses, **opts):
    """Six steps with everything that draws at random and everything that has state."""
    cfg = distilled_cfg(tmp_path, *losses) if losses else classifier_cfg()
    set_options(
        cfg,
        {
            "DATASETS__TRAIN": (folder,),
            "DATASETS__TEST": (folder,),
            "CLASSIFICATION__AUG__MIXUP": 0.5,
            "CLASSIFICATION__AUG__COLOR_JITTER": (0.1, 0.1, 0.1, 0.1),
            "CLASSIFICATION__EMA_DECAY": 0.9,
            "KD__OVERHAUL__CALIBRATION_IMAGES": 4,
            "SOLVER__MAX_ITER": 6,
            "SOLVER__CHECKPOINT_PERIOD": 2,
            "SOLVER__BASE_LR": 0.05,
            "SOLVER__LR_SCHEDULER_NAME": "WarmupCosineLR",
            "SOLVER__WARMUP_ITERS": 2,
            "SEED": 7,
            "OUTPUT_DIR": str(tmp_path / "out"),
            **opts,
        },
    )
    return cfg


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, folder):
    cfg = run_cfg(tmp_path, folder, "NST", "Overhaul", "SoftTarget")
    train(cfg, trainer_class=ClassificationTrainer)
    out = Path(cfg.OUTPUT_DIR)
    whole = torch.load(out / "model_final.pth", weights_only=True)
    assert {"ema", "model"} <= set(whole) and whole["ema"]["updates"] == 6
    (out / "last_checkpoint").write_text("model_0000003.pth")
    for name in ("model_final.pth", "backbone.pkl", "model_ema.pth"):
        (out / name).unlink()
    train(cfg, resume=True, trainer_class=ClassificationTrainer)
    assert differing(whole, torch.load(out / "model_final.pth", weights_only=True)) == []


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_the_exported_backbone_is_the_detectors(tmp_path, folder, norm):
    cfg = run_cfg(tmp_path, folder, "HintLoss")
    train(cfg, trainer_class=ClassificationTrainer)
    path = os.path.join(cfg.OUTPUT_DIR, "backbone.pkl")

    detector_cfg = tiny_cfg(MODEL__RESNETS__NORM=norm, MODEL__PIXEL_STD=[57.0] * 3, INPUT__FORMAT="RGB")
    detector = build_model(detector_cfg).eval()
    checkpointer = DetectionCheckpointer(detector)
    content = checkpointer._load_file(path)
    check_normalisation(content, detector_cfg)
    found = checkpointer._load_model(content)
    assert found.unexpected_keys == [] and found.incorrect_shapes == []
    assert not [key for key in found.missing_keys if key.startswith("backbone.bottom_up.")]

    classifier = build_model(student_cfg(cfg)).eval()
    averaged = torch.load(os.path.join(cfg.OUTPUT_DIR, "model_ema.pth"), weights_only=True)["model"]
    classifier.load_state_dict(averaged)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = classifier.backbone(x), detector.backbone.bottom_up(x)
    for level in ("res2", "res3", "res4", "res5"):
        if norm == "BN":
            assert torch.equal(found[level], expected[level])
        else:
            assert torch.allclose(found[level], expected[level], rtol=1e-4, atol=1e-5)
    last = torch.load(os.path.join(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)["model"]
    assert not torch.equal(last["linear.weight"], averaged["linear.weight"])


def test_it_learns_and_evaluates_what_it_exports(tmp_path, folder):
    # All twelve images a step, as they are: any processor learns them.
    options = {"MIXUP": 0.0, "COLOR_JITTER": (0.0,) * 4, "SCALE": (1.0, 1.0)}
    options = {f"CLASSIFICATION__AUG__{key}": value for key, value in options.items()}
    cfg = run_cfg(tmp_path, folder, SOLVER__MAX_ITER=40, SOLVER__IMS_PER_BATCH=12, **options)
    cfg.SOLVER.CHECKPOINT_PERIOD = 100
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    trainer = train(cfg, trainer_class=ClassificationTrainer)
    top1 = trainer._last_eval_results["classification"]["top1"]
    assert top1 > 70
    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_ema.pth")
    assert evaluate(cfg, ClassificationTrainer)["classification"]["top1"] == top1


def test_mixed_images_reach_the_teacher(tmp_path, folder):
    cfg = run_cfg(tmp_path, folder, "SoftTarget")
    trainer = ClassificationTrainer(cfg)
    seen = {}
    model = trainer.model
    for side, network in (("student", model.student), ("teacher", model.teacher)):
        network.backbone.register_forward_pre_hook(lambda m, args, side=side: seen.__setitem__(side, args[0]))
    batch = next(iter(trainer.data_loader))
    assert batch[0]["label"].shape == (4,)
    model.train()(batch)
    assert torch.equal(seen["student"], seen["teacher"])


def test_weights_are_suggested(tmp_path, folder, capsys):
    cfg = run_cfg(tmp_path, folder, "NST", "SoftTarget", KD__NST__WEIGHT=3.0)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    argv = ["--config-file", str(tmp_path / "run.yaml"), "--batches", "2", "--share", "0.25"]
    weights.main(argv)
    *table, _, line = capsys.readouterr().out.splitlines()
    rows = {row.split()[0]: row.split()[1:] for row in table[2:]}
    assert list(rows) == ["task", "nst", "soft_target"] and rows["nst"][0] == "3"
    task, nst = float(rows["task"][2]), float(rows["nst"][2])
    found = dict(zip(line.split()[::2], line.split()[1::2]))
    assert float(found["KD.NST.WEIGHT"]) == pytest.approx(3 * 0.25 * task / nst, rel=0.02)  # of printed numbers
    assert not (tmp_path / "out").exists()


def test_pairs_may_follow_the_compared_configs(monkeypatch):
    seen = []

    def planned_runs(files, seeds, opts, *, num_gpus):
        seen.extend([files, seeds, opts])

    monkeypatch.setattr(pretrain, "planned_runs", planned_runs)
    monkeypatch.setattr(pretrain, "compare", lambda runs: "")
    pretrain.main(["--seeds", "0", "3", "--compare", "a.yaml", "b.yaml", "OUTPUT_DIR", "x", "SOLVER.MAX_ITER", "5"])
    assert seen == [["a.yaml", "b.yaml"], [0, 3], ["OUTPUT_DIR", "x", "SOLVER.MAX_ITER", "5"]]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config-file", "b.yaml", "--resume"], "without --config-file, --resume"),
        (["--num-machines", "2", "--dist-url", "tcp://localhost:1"], "on one machine"),
    ],
)
def test_what_does_not_go_with_compare(argv, message, capsys):
    with pytest.raises(SystemExit):
        pretrain.main([*argv, "--compare", "a.yaml"])
    assert message in capsys.readouterr().err


def empty_class(cfg, root):
    (root / "images" / "empty").mkdir()


def no_images(cfg, root):
    shutil.rmtree(root / "images")
    (root / "images").mkdir()


def a_detector(cfg, root):
    cfg.merge_from_other_cfg(tiny_cfg())


BAD = {
    "a detector's config": (a_detector, "the config is of GeneralizedRCNN, which is for tools/train_net.py"),
    "fewer classes than the data": (
        lambda cfg, root: set_options(cfg, {"CLASSIFICATION__NUM_CLASSES": 3, "KD__LOSSES": ("NST",)}),
        "has 4 classes (labels 0..3) and CLASSIFICATION.NUM_CLASSES is 3",
    ),
    "class counts of teacher and student": (
        lambda cfg, root: set_options(cfg, {"CLASSIFICATION__NUM_CLASSES": 3}),
        "compares class by class: the student has 3 classes and the teacher 4",
    ),
    "an empty class folder": (empty_class, "Found no valid file for the classes empty"),
    "no image set": (no_images, "Couldn't find any class folder"),
    "no such teacher": (
        lambda cfg, root: set_options(cfg, {"KD__TEACHER__CONFIG_FILE": "timm://resnet5O"}),
        "Unknown model of timm 'resnet5O'. Did you mean 'resnet50'",
    ),
    "no such tap": (
        lambda cfg, root: set_options(cfg, {"KD__LOSSES": ("NST",), "KD__NST__STUDENT_TAPS": ("res6",)}),
        "Unknown tap of the student 'res6'",
    ),
    "an augmentation that cannot be": (
        lambda cfg, root: set_options(cfg, {"CLASSIFICATION__AUG__SCALE": (1.0, 0.08)}),
        "CLASSIFICATION.AUG.SCALE must be two positive numbers in order",
    ),
    "no such data set": (
        lambda cfg, root: set_options(cfg, {"DATASETS__TEST": ("digit_crops_val",)}),
        "Unknown data set 'digit_crops_val'. Did you mean 'digits_crops_val'",
    ),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_before_training(tmp_path, folder, capsys, change, message):
    cfg = run_cfg(tmp_path, folder, "SoftTarget")
    change(cfg, tmp_path)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--config-file", str(tmp_path / "run.yaml")])
    assert exit_.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_classifiers_config_is_not_for_train_net(tmp_path, folder):
    with pytest.raises(ValueError, match="the config is of ImageClassifier, which is for tools/pretrain_backbone"):
        check_trainer(run_cfg(tmp_path, folder, "SoftTarget"), Trainer)
    check_trainer(tiny_cfg(), type("MyTrainer", (Trainer,), {}))


def test_scores_are_those_of_the_plain_classifier(tmp_path, folder):
    cfg = run_cfg(tmp_path, folder, "SoftTarget")
    trainer = train(cfg, trainer_class=ClassificationTrainer)
    plain = build_model(student_cfg(cfg)).eval()
    DetectionCheckpointer(plain).load(os.path.join(cfg.OUTPUT_DIR, "model_final.pth"))
    with torch.no_grad():
        assert torch.equal(plain(images())[1]["scores"], trainer.model.eval()(images())[1]["scores"])
