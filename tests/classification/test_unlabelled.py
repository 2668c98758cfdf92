"""Backbones without labels: the student, its images, whole runs, and what is refused before one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from kd_det import build_student, build_teacher, student_cfg
from kd_det.classification.data import load_images, register_configured
from kd_det.classification.loader import build_test_loader, build_train_loader
from kd_det.classification.trainer import ClassificationTrainer
from kd_det.cli import pretrain, weights
from kd_det.engine import evaluate
from kd_det.engine.teacher_evaluation import evaluate_teacher
from kd_det.errors import DatasetError
from tests.classification.test_distributed import storage  # noqa: F401
from tests.classification.tiny_classifier import (
    classifier_cfg,
    distilled_cfg,
    images,
    set_options,
    unlabelled_cfg,
    write_flat,
    write_folder,
)
from tests.engine.test_distributed import _in_fork, on_two_ranks, step
from tests.tiny import tiny_cfg
from tests.tiny_run import differing, train, write_coco


@pytest.fixture(autouse=True)
def catalog():
    """Whatever a test registers is gone after it."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def run_cfg(tmp_path, *losses, **opts):
    """Six steps on images without labels, with everything that draws at random; folders with labels for the probes."""
    write_flat(tmp_path / "flat")
    write_folder(tmp_path / "known", per_class=4)
    write_folder(tmp_path / "val")
    defaults = {
        "CLASSIFICATION__UNLABELLED": [["flat", str(tmp_path / "flat")]],
        "CLASSIFICATION__IMAGE_FOLDERS": [["known", str(tmp_path / "known")], ["val", str(tmp_path / "val")]],
        "CLASSIFICATION__PROBE__TRAIN": "known",
        "CLASSIFICATION__EMA_DECAY": 0.9,
        "CLASSIFICATION__AUG__COLOR_JITTER": (0.1, 0.1, 0.1, 0.1),
        "CLASSIFICATION__AUG__MIXUP": 0.5,
        "DATASETS__TRAIN": ("flat",),
        "DATASETS__TEST": ("val",),
        "TEST__EVAL_PERIOD": 3,
        "SOLVER__MAX_ITER": 6,
        "SOLVER__CHECKPOINT_PERIOD": 2,
        "SOLVER__WARMUP_ITERS": 2,
        "SEED": 7,
        "OUTPUT_DIR": str(tmp_path / "out"),
    }
    cfg = unlabelled_cfg(tmp_path, *losses, **{**defaults, **opts})
    register_configured(cfg)
    return cfg


LOSSES = ("FeatureDistillation", "Hint", "NST", "Similarity")


def test_it_learns_the_maps_alone_of_the_same_images(tmp_path):
    model = build_model(unlabelled_cfg(tmp_path, *LOSSES)).train()
    seen = {}
    for side, network in (("student", model.student), ("teacher", model.teacher)):
        network.backbone.register_forward_pre_hook(lambda m, args, side=side: seen.__setitem__(side, args[0]))
    batch = [{"image": x["image"]} for x in images()]
    losses = model(batch)
    assert set(losses) == {"loss_fd", "loss_hint", "loss_nst", "loss_similarity"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    raw = torch.stack([x["image"] for x in batch])
    for side, network in (("student", model.student), ("teacher", model.teacher)):  # each with its own normalisation
        torch.testing.assert_close(seen[side], (raw - network.pixel_mean) / network.pixel_std)
    assert not torch.equal(model.teacher.pixel_std, model.student.pixel_std)


def test_in_eval_it_gives_pooled_features(tmp_path):
    model = build_model(student_cfg(unlabelled_cfg(tmp_path))).eval()
    found = model([{"image": x["image"]} for x in images(3)])
    maps = model.backbone(model.preprocess_image(images(3)).tensor)["res5"]
    torch.testing.assert_close(torch.stack([x["features"] for x in found]), maps.mean((2, 3)))
    assert model([]) == [] and model.in_channels == 32


def test_a_teacher_of_one_size_gets_its_size(tmp_path):
    """test_vit takes 160 x 160 only: 10 x 10 positions of crops of 32 x 32, compared on the student's 1 x 1."""
    only = ["MODEL.TIMM.OPTS", ["dynamic_img_size", False]]
    with pytest.raises(ValueError, match="dynamic_img_size"):
        build_model(unlabelled_cfg(tmp_path, KD__TEACHER__OPTS=only))
    opts = {"KD__TEACHER__OPTS": [*only, "CLASSIFICATION.INPUT_SIZE", 160]}
    model = build_model(unlabelled_cfg(tmp_path, **opts)).train()
    seen = []
    model.losses["fd"].register_forward_pre_hook(lambda _, args: seen.append(args))
    model(images())
    ((student, teacher, context),) = seen
    assert student[0].shape[2:] == (1, 1) and teacher[0].shape[2:] == (10, 10) and context.valid(teacher[0]) is None


@pytest.mark.parametrize(
    "backbone, options",
    [
        ("build_timm_backbone", {"MODEL__TIMM__NAME": "mobilenetv2_035"}),
        ("build_timm_backbone", {"MODEL__TIMM__NAME": "efficientnet_lite0"}),
        ("build_resnet_backbone", {"MODEL__RESNETS__RES2_OUT_CHANNELS": 64}),
    ],
)
def test_small_students(tmp_path, backbone, options):
    options = {"MODEL__BACKBONE__NAME": backbone, "MODEL__RESNETS__OUT_FEATURES": ["res5"], **options}
    model = build_model(unlabelled_cfg(tmp_path, **options)).train()
    model(images(2, size=64))["loss_fd"].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t", "regnet_y_400mf", "shufflenet_v2_x0_5"])
def test_classifiers_of_torchvision_teach_their_maps(tmp_path, name):
    from torchvision.models import get_model

    network = get_model(name, weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    opts = {"KD__TEACHER__CONFIG_FILE": f"torchvision://{name}", "KD__TEACHER__WEIGHTS": str(tmp_path / "w.pth")}
    model = build_model(unlabelled_cfg(tmp_path, KD__TEACHER__OPTS=[], **opts)).train()
    assert model(images(2, size=64))["loss_fd"] > 0
    shape = model.teacher.backbone.output_shape()["res5"]
    assert shape.stride == 32 and shape.channels == model.losses["fd"].connectors[0].out_channels


def names(files):
    return [os.path.basename(x["file_name"]) for x in files]


def test_a_folder_a_list_and_a_json_are_images(tmp_path):
    root = write_flat(tmp_path / "flat")
    (tmp_path / "flat" / "notes.txt").write_text("no image")
    (tmp_path / "list.txt").write_text("flat/1.png\n\n flat/deep/er/0.png \n")
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"id": 3, "file_name": "2.png"}], "annotations": []}))
    entries = [["a", root], ["b", str(tmp_path / "list.txt")], ["c", str(tmp_path / "coco.json"), root]]
    cfg = classifier_cfg(CLASSIFICATION__UNLABELLED=entries)
    register_configured(cfg)
    register_configured(cfg)  # again is no error
    assert names(load_images(["a"])) == ["1.png", "2.png", "4.png", "5.png", "0.png", "3.png"]
    assert names(load_images(["b", "c"])) == ["1.png", "0.png", "2.png"]
    assert all(os.path.isfile(x["file_name"]) and set(x) == {"file_name"} for x in load_images(["a", "b", "c"]))


def test_any_registered_data_set_gives_its_images_without_labels(tmp_path):
    name = write_coco(tmp_path / "coco", name=f"coco_{tmp_path.name}")
    cfg = unlabelled_cfg(tmp_path, DATASETS__TRAIN=(name,))
    batch = next(iter(build_train_loader(cfg)))
    assert all(set(x) == {"file_name", "image"} for x in batch)


def test_probes_learn_from_an_even_share(tmp_path):
    cfg = run_cfg(tmp_path, CLASSIFICATION__PROBE__MAX_IMAGES=5)
    labels = [x["label"] for batch in build_test_loader(cfg, "known") for x in batch]
    assert labels == [0, 1, 2, 3]  # of 16, every fourth
    assert sum(map(len, build_test_loader(cfg, "val"))) == 12


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path):
    cfg = run_cfg(tmp_path, *LOSSES)
    trainer = train(cfg, trainer_class=ClassificationTrainer)
    assert {"knn", "linear"} <= set(trainer._last_eval_results)
    out = Path(cfg.OUTPUT_DIR)
    whole = torch.load(out / "model_final.pth", weights_only=True)
    logged = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert {"knn/top1", "knn/top5", "linear/top1", "linear/top5"} <= set(logged[-1])
    (out / "last_checkpoint").write_text("model_0000003.pth")
    for name in ("model_final.pth", "backbone.pkl", "model_ema.pth"):
        (out / name).unlink()
    train(cfg, resume=True, trainer_class=ClassificationTrainer)
    assert differing(whole, torch.load(out / "model_final.pth", weights_only=True)) == []
    # The average is what was evaluated, and is a model of its own.
    cfg.MODEL.WEIGHTS = str(out / "model_ema.pth")
    assert evaluate(student_cfg(cfg), ClassificationTrainer) == trainer._last_eval_results


def test_the_exported_backbone_is_the_detectors(tmp_path):
    cfg = run_cfg(tmp_path, SOLVER__MAX_ITER=2, CLASSIFICATION__EMA_DECAY=0.0, DATASETS__TEST=())
    trainer = train(cfg, trainer_class=ClassificationTrainer)
    detector = build_model(tiny_cfg(MODEL__RESNETS__NORM="BN")).eval()
    checkpointer = DetectionCheckpointer(detector)
    found = checkpointer._load_model(checkpointer._load_file(os.path.join(cfg.OUTPUT_DIR, "backbone.pkl")))
    assert not found.unexpected_keys and not found.incorrect_shapes
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = trainer.model.eval().backbone(x), detector.backbone.bottom_up(x)
    assert all(torch.equal(found[level], expected[level]) for level in ("res2", "res3", "res4", "res5"))


def test_corrupt_images_are_skipped(tmp_path):
    cfg = run_cfg(tmp_path, CLASSIFICATION__CORRUPT_IMAGES="skip")
    (tmp_path / "flat" / "1.png").write_text("no image")
    batches = iter(build_train_loader(cfg))
    assert not any(name == "1.png" for _ in range(6) for name in names(next(batches)))


@pytest.mark.parametrize("loss", ["FeatureDistillationLoss", "SimilarityLoss"])
def test_two_ranks_with_half_the_batch_are_one_with_the_whole(tmp_path, loss):
    cfg = unlabelled_cfg(tmp_path, loss, MODEL__RESNETS__NORM="FrozenBN")
    whole, halves = _in_fork(tmp_path, step, cfg, images()), on_two_ranks(tmp_path, step, cfg, images())
    for key, value in whole["losses"].items():
        torch.testing.assert_close((halves[0]["losses"][key] + halves[1]["losses"][key]) / 2, value)
    largest = float(max(g.abs().max() for g in whole["gradients"].values()))
    for name, gradient in whole["gradients"].items():
        for half in halves:
            torch.testing.assert_close(half["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * largest)


def run(cfg) -> dict:
    trainer = train(cfg, trainer_class=ClassificationTrainer)
    return {
        "weights": trainer.model.module.state_dict(),
        "average": trainer.average.state_dict()["averages"],
        "results": getattr(trainer, "_last_eval_results", None),
    }


def test_a_run_on_two_ranks(tmp_path):
    cfg = run_cfg(tmp_path, SOLVER__MAX_ITER=3)
    first, second = on_two_ranks(tmp_path, run, cfg)
    for part in ("weights", "average"):
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items())
    assert set(first["results"]) == {"knn", "linear"} and not second["results"]
    assert os.path.isfile(tmp_path / "out" / "backbone.pkl")


def an_empty_folder(cfg, root):
    shutil.rmtree(root / "flat")
    (root / "flat").mkdir()


def no_folder(cfg, root):
    shutil.rmtree(root / "flat")


def a_corrupt_image(cfg, root):
    (root / "flat" / "4.png").write_bytes((root / "flat" / "4.png").read_bytes()[:60])


def only_corrupt_images(cfg, root):
    cfg.CLASSIFICATION.CORRUPT_IMAGES = "skip"
    for path in (root / "flat").rglob("*.png"):
        path.write_text("no image")


def listed(name, content):
    def change(cfg, root):
        (root / name).write_text(content)
        cfg.CLASSIFICATION.UNLABELLED = [["flat2", str(root / name)]]
        cfg.DATASETS.TRAIN = ("flat2",)

    return change


def options(**opts):
    return lambda cfg, root: set_options(cfg, opts)


def as_image_folder(cfg, root):
    shutil.rmtree(root / "flat" / "deep")
    cfg.CLASSIFICATION.IMAGE_FOLDERS = [["flat2", str(root / "flat")]]
    cfg.DATASETS.TRAIN = ("flat2",)


BAD = {
    "a folder without images": (an_empty_folder, "data set 'flat': no image in "),
    "no folder": (no_folder, "data set 'flat': expected a folder of images, a COCO json, or a file with a path a line"),
    "a corrupt image": (a_corrupt_image, "4.png cannot be read"),
    "only corrupt images": (only_corrupt_images, "no image of flat that was tried can be read"),
    "a list with a missing file": (listed("list.txt", "flat/1.png\nflat/9.png\n"), "1 of 2 images are missing"),
    "a json without images": (listed("a.json", '{"annotations": []}'), "KeyError: 'images'"),
    "a json with an empty list": (listed("a.json", '{"images": []}'), "data set 'flat2': no image in "),
    "no json": (listed("a.json", "flat/1.png"), "JSONDecodeError"),
    "a binary file": (lambda cfg, root: listed("x.bin", "\x00\n")(cfg, root), "1 of 1 images are missing"),
    "no pair": (options(CLASSIFICATION__UNLABELLED=[["photos"]]), "or [name, folder] or [name, file] pairs, found ['ph"),
    "a name of both kinds": (
        options(CLASSIFICATION__UNLABELLED=[["val", "elsewhere"]]),
        "CLASSIFICATION.UNLABELLED: the data set name 'val' is taken",
    ),
    "a flat folder as one of classes": (as_image_folder, "images without classes belong to CLASSIFICATION.UNLABELLED"),
    "no labels to evaluate on": (options(DATASETS__TEST=("flat",)), "data set 'flat' is not for classification"),
    "no labels to train on": (
        options(KD__STUDENT__META_ARCHITECTURE="ImageClassifier", KD__LOSSES=("NST",)),
        "data set 'flat' is not for classification",
    ),
    "nothing to learn the probes from": (options(CLASSIFICATION__PROBE__TRAIN=""), "set CLASSIFICATION.PROBE.TRAIN"),
    "probes on what they learnt": (options(CLASSIFICATION__PROBE__TRAIN="val"), "learn from another data set"),
    "losses on class scores": (options(KD__LOSSES=("SoftTarget", "DKD", "NST")), "SoftTargetLoss, DKDLoss compare cl"),
    "a loss on labels": (options(KD__LOSSES=("GradientAttention",)), "GradientAttentionLoss compare class scores or n"),
    "positions of boxes": (options(KD__FD__REGIONS="boxes"), "KD.FD.REGIONS is 'boxes', and BackboneOnly has images"),
    "no loss": (options(KD__LOSSES=()), "BackboneOnly learns from a teacher's maps alone, and no loss is on"),
    "no teacher": (options(MODEL__META_ARCHITECTURE="BackboneOnly"), "name a teacher by --teacher"),
    "weights that set themselves": (options(KD__AUTO_WEIGHT=0.5), "KD.AUTO_WEIGHT measures losses against the stud"),
    "losses that stop": (options(KD__STOP_ITER=3), "all of them stop (KD.STOP_ITER) before SOLVER.MAX_ITER 6"),
    "a shallow tap": (
        options(KD__FD__STUDENT_TAPS=("res4",), KD__FD__TEACHER_TAPS=("res4",)),
        "no loss reads behind the student's res4, so 9 of the backbone's weights would stay as they are (res5.0.",
    ),
    "no level in common": (options(KD__FD__STUDENT_TAPS=("res5",)), "Unknown tap of the teacher 'res5'"),
    "a ViT of one size": (
        options(KD__TEACHER__CONFIG_FILE="timm://vit_tiny_patch16_224", KD__TEACHER__OPTS=[]),
        "needs MODEL.TIMM.OPTS ['dynamic_img_size', True] in KD.TEACHER.OPTS; or its own side there as CLASSIFICATION.",
    ),
    "a teacher without classes to evaluate": (options(KD__TEACHER__EVALUATE=True), "there is nothing to evaluate"),
    "no such feature to pool": (options(CLASSIFICATION__IN_FEATURE="res6"), "CLASSIFICATION.IN_FEATURE 'res6'"),
    "no neighbours": (options(CLASSIFICATION__PROBE__NEIGHBOURS=0), "PROBE.NEIGHBOURS must be at least 1, found 0"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_before_training(tmp_path, capsys, change, message):
    cfg = run_cfg(tmp_path)
    change(cfg, tmp_path)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--config-file", str(tmp_path / "run.yaml")])
    assert exit_.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_teacher_on_the_command_line_is_distilled_by_fd(tmp_path):
    """The shortest way: a plain BackboneOnly and --teacher."""
    cfg = run_cfg(tmp_path, SOLVER__MAX_ITER=1, DATASETS__TEST=())
    teacher = ["--teacher", "timm://test_vit", "--teacher-weights", cfg.KD.TEACHER.WEIGHTS]
    cfg.MODEL.META_ARCHITECTURE, cfg.KD.LOSSES = "BackboneOnly", ()
    (tmp_path / "run.yaml").write_text(cfg.dump())
    pretrain.main(["--config-file", str(tmp_path / "run.yaml"), *teacher])
    logged = (tmp_path / "out" / "metrics.json").read_text()
    assert "loss_fd" in logged and "loss_cls" not in logged
    assert (tmp_path / "out" / "backbone.pkl").exists()


def test_a_classifier_that_teaches_is_evaluated_by_its_own_scores(tmp_path):
    cfg = run_cfg(tmp_path)
    taught = distilled_cfg(tmp_path)
    cfg.KD.TEACHER = taught.KD.TEACHER
    teacher = build_teacher(cfg)
    results = evaluate_teacher(cfg, build_student(cfg), teacher, ClassificationTrainer)
    assert set(results) == {"classification"}


def test_runs_are_compared_by_the_linear_probe(tmp_path):
    path = str(tmp_path / "run.yaml")
    Path(path).write_text(run_cfg(tmp_path).dump())
    ((first, second),) = pretrain.planned_runs([path], [0, 1], []).values()
    assert (first.task, first.cfg.SEED, second.cfg.SEED) == ("linear", 0, 1)


def test_weights_are_not_measured_against_nothing(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(run_cfg(tmp_path).dump())
    with pytest.raises(SystemExit):
        weights.main(["--config-file", str(tmp_path / "run.yaml")])
    assert "BackboneOnly has no losses of its own" in capsys.readouterr().err


def test_no_data_set_of_that_name(tmp_path):
    with pytest.raises(DatasetError, match="Unknown data set 'photos'"):
        load_images(["photos"])
