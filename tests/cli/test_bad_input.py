"""
What is wrong with a run is said in one line before training starts, and nothing is written. Each case: what is done to
a run that is fine, and what the message must say.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from kd_det.cli import argument_parser, check_run, load_config, parse_arguments
from kd_det.cli.run_tool import USER_ERRORS
from kd_det.errors import one_line
from tests.tiny import tiny_cfg
from tests.tiny_run import run_cfg, train, write_coco

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


@pytest.fixture
def run(tmp_path):
    """A run that is fine."""
    cfg = run_cfg(tmp_path, "NST")
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    (tmp_path / "run.yaml").write_text(cfg.dump())
    return tmp_path


def check(run, *argv: str):
    args = parse_arguments(argument_parser(), ["--config-file", str(run / "run.yaml"), *argv])
    return check_run(load_config(args), args)


def message_of(run, *argv: str) -> str:
    with pytest.raises(USER_ERRORS) as e:
        check(run, *argv)
    assert not (run / "out").exists()
    return one_line(e.value)


def test_the_run_is_fine(run):
    check(run)
    check(run, "--num-gpus", "2")


OPTIONS = {
    # The losses.
    "unknown loss": (
        ["KD.LOSSES", "('NTS',)"],
        "Unknown distillation loss 'NTS'. Did you mean 'NST'.*--import MODULE, or KD.IMPORTS",
    ),
    "loss twice": (["KD.LOSSES", "('NST','NSTLoss')"], "names NSTLoss more than once"),
    "losses no list": (["KD.LOSSES", "NST"], "KD.LOSSES"),
    "losses a number": (["KD.LOSSES", "3"], "KD.LOSSES"),
    "loss a number": (["KD.LOSSES", "(3,)"], "Unknown distillation loss"),
    "negative weight": (["KD.NST.WEIGHT", "-1.0"], "weight must be a finite number >= 0, found -1.0"),
    "infinite weight": (["KD.NST.WEIGHT", "1e999"], "weight must be a finite number >= 0, found inf"),
    "weight a word": (["KD.NST.WEIGHT", "much"], "KD.NST.WEIGHT"),
    "weight automatic": (["KD.NST.WEIGHT", "automatic"], "KD.NST.WEIGHT"),
    "auto weight a word": (["KD.NST.AUTO_WEIGHT", "half"], "KD.NST or of KD: AUTO_WEIGHT must be a positive number"),
    "auto weight negative": (["KD.AUTO_WEIGHT", "-0.5"], "AUTO_WEIGHT must be a positive number .* found -0.5"),
    "auto weight of no batches": (
        ["KD.AUTO_WEIGHT", "0.5", "KD.AUTO_WEIGHT_BATCHES", "0"],
        "AUTO_WEIGHT_BATCHES at least 1",
    ),
    "average that stays": (["KD.EMA_DECAY", "1.0"], "KD.EMA_DECAY must be in .* found 1.0"),
    "teachers no list": (["KD.TEACHERS", "b.yaml"], "KD.TEACHERS"),
    "teachers are names": (
        ["KD.TEACHERS", "['b.yaml']"],
        "must have keys, such as CONFIG_FILE and WEIGHTS, found 'b.yaml'",
    ),
    "teacher without a config": (["KD.TEACHERS", "[{'WEIGHT': 2.0}]"], "KD.TEACHER.CONFIG_FILE is empty"),
    "teacher of a wrong key": (
        ["KD.TEACHERS", "[{'CONFIG': 'b.yaml'}]"],
        "Unknown key of KD.TEACHERS.0. 'CONFIG'. Did you mean 'CONFIG_FILE'",
    ),
    "teacher without a file": (
        ["KD.TEACHERS", "[{'CONFIG_FILE': 'b.yaml'}]"],
        "'b.yaml' is neither a file nor in Detectron2's model zoo",
    ),
    "own average with weights": (["KD.TEACHER.CONFIG_FILE", "ema"], "KD.TEACHER.WEIGHTS is not for CONFIG_FILE 'ema'"),
    "weight a list": (["KD.NST.WEIGHT", "[1.0]"], "KD.NST.WEIGHT"),
    "unknown kernel": (["KD.NST.KERNEL", "cubic"], "cubic"),
    "degree 0": (["KD.NST.DEGREE", "0"], "degree"),
    "negative warm-up": (["KD.WARMUP_ITERS", "-3"], "WARMUP_ITERS must be >= 0"),
    "stop before never": (["KD.STOP_ITER", "-2"], "STOP_ITER >= -1"),
    "decay after the stop": (
        ["KD.DECAY", "cosine", "KD.DECAY_START", "90", "KD.STOP_ITER", "80"],
        "KD.NST or of KD: DECAY_START must be .* before STOP_ITER.* found 90 and 80",
    ),
    "unknown decay": (["KD.NST.DECAY", "step"], "Unknown DECAY 'step'. Valid names: linear, cosine"),
    "unknown regions": (["KD.NST.REGIONS", "box"], "Unknown KD.NST.REGIONS 'box'. Did you mean 'boxes'"),
    "share above 1": (["KD.NST.FOREGROUND_SHARE", "2.0"], "KD.NST.FOREGROUND_SHARE must be in 0 to 1, found 2.0"),
    "warm-up a word": (["KD.NST.WARMUP_ITERS", "soon"], "soon"),
    "no value": (["KD.LOSSES", "None"], "KD.LOSSES is None, and needs a value"),
    "no value of a loss": (["KD.NST.WEIGHT", "None"], "KD.NST.WEIGHT is None, and needs a value"),
    "unknown key": (["KD.NST.WIGHT", "1.0"], "Unknown config key 'KD.NST.WIGHT'. Did you mean 'KD.NST.WEIGHT'"),
    "unknown node": (["KD.NTS.WEIGHT", "1.0"], "Unknown config key 'KD.NTS.WEIGHT'"),
    "unknown treatment of NaN": (
        ["KD.NON_FINITE", "ignore"],
        "KD.NON_FINITE must be one of stop, skip, found 'ignore'",
    ),
    "best by masks of a box detector": (
        ["KD.BEST_METRIC", "segm/AP", "TEST.EVAL_PERIOD", "2"],
        "Unknown KD.BEST_METRIC 'segm/AP'. Valid names: bbox/AP, bbox/AP50, .*bbox/AP-2",
    ),
    "best of one of two data sets": (
        ["KD.BEST_METRIC", "bbox/AP", "TEST.EVAL_PERIOD", "2", "DATASETS.TEST", "('tiny','tiny')"],
        "Unknown KD.BEST_METRIC 'bbox/AP'. Did you mean 'tiny/bbox/AP'",
    ),
    # The taps.
    "unknown tap": (["KD.NST.STUDENT_TAPS", "('p9',)"], "Unknown tap of the student 'p9'"),
    "unknown teacher tap": (
        ["KD.NST.STUDENT_TAPS", "('p2',)", "KD.NST.TEACHER_TAPS", "('q2',)"],
        "Unknown tap of the teacher 'q2'",
    ),
    "numbers of taps": (["KD.NST.TEACHER_TAPS", "('p2',)"], "the numbers must be equal"),
    "pre-activation of a level": (["KD.NST.STUDENT_TAPS", "('p2.pre_activation',)"], "has no tap 'p2.pre_activation'"),
    "empty tap": (["KD.NST.STUDENT_TAPS", "('',)"], "tap of the student ''"),
    "tap a number": (["KD.NST.STUDENT_TAPS", "(2,)"], "tap"),
    # The teacher.
    "no teacher": (["KD.TEACHER.CONFIG_FILE", ""], "KD.TEACHER.CONFIG_FILE is empty"),
    "unknown teacher": (
        ["KD.TEACHER.CONFIG_FILE", "COCO-Detection/faster_rcnn_R_101_FPN_3z.yaml"],
        "Did you mean 'COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml'",
    ),
    "no teacher weights": (["KD.TEACHER.WEIGHTS", ""], "has no weights"),
    "teacher is a URL": (
        ["KD.TEACHER.CONFIG_FILE", "https://host/x.yaml"],
        "is a URL. Expected a config file .*, .* timm://NAME",
    ),
    "teacher is no network of torchvision": (
        ["KD.TEACHER.CONFIG_FILE", "torchvision://fasterrcnn_resnet51_fpn"],
        "Unknown network of torchvision 'fasterrcnn_resnet51_fpn'. Did you mean 'fasterrcnn_resnet50_fpn",
    ),
    "teacher has no such weights": (
        ["KD.TEACHER.CONFIG_FILE", "timm://resnet18.a1_in2k"],
        "Unknown weights of timm's 'resnet18' 'a1_in2k'. Did you mean 'a1_in1k'",
    ),
    "teacher to evaluate on nothing": (
        ["KD.TEACHER.EVALUATE", "True", "DATASETS.TEST", "()"],
        "KD.TEACHER.EVALUATE needs data sets to evaluate on, and DATASETS.TEST is empty",
    ),
    "teacher is a LazyConfig without weights": (
        ["KD.TEACHER.CONFIG_FILE", "COCO-Detection/fcos_R_50_FPN_1x.py", "KD.TEACHER.WEIGHTS", ""],
        "fcos_R_50_FPN_1x.py' has no weights",
    ),
    "missing teacher weights": (["KD.TEACHER.WEIGHTS", "nowhere.pth"], "do not exist: 'nowhere.pth'"),
    "teacher of another size": (
        ["KD.TEACHER.OPTS", "['MODEL.RESNETS.RES2_OUT_CHANNELS', 16]"],
        "do not fit the teacher.*misshapen",
    ),
    "deeper teacher": (["KD.TEACHER.OPTS", "['MODEL.ROI_BOX_HEAD.NUM_FC', 2]"], "do not fit the teacher.*missing"),
    "shallower teacher": (["KD.TEACHER.OPTS", "['MODEL.ROI_BOX_HEAD.NUM_FC', 0]"], "do not fit|cannot be built"),
    "unknown teacher option": (["KD.TEACHER.OPTS", "['MODEL.DEPTH', 2]"], "KD.TEACHER.OPTS: Unknown config key"),
    "odd teacher options": (["KD.TEACHER.OPTS", "['MODEL.DEVICE']"], "KD.TEACHER.OPTS"),
    "teacher of another architecture": (
        ["KD.TEACHER.OPTS", "['MODEL.META_ARCHITECTURE', 'RetinaNit']"],
        "Unknown teacher meta-architecture 'RetinaNit'. Did you mean 'RetinaNet'",
    ),
    "teacher with other classes": (
        ["KD.LOSSES", "('SoftTarget',)", "MODEL.ROI_HEADS.NUM_CLASSES", "4"],
        "the student has 4 classes and the teacher 3",
    ),
    "no class in common": (
        ["KD.LOSSES", "('SoftTarget',)", "KD.TEACHER.CLASSES", "['x', 'y', 'z']"],
        "no class in common: the student's are 0, 1, 2, the teacher's x, y, z",
    ),
    "too few names of the teacher's classes": (
        ["KD.LOSSES", "('SoftTarget',)", "KD.TEACHER.CLASSES", "['1', '2']"],
        "a name for each class, found .* 2 for the teacher's 3 .KD.TEACHER.CLASSES",
    ),
    "class map of an unknown class": (
        ["KD.LOSSES", "('DKD',)", "KD.TEACHER.CLASS_MAP", "[['cat', 0]]"],
        "KD.TEACHER.CLASS_MAP: Unknown class of the student 'cat'. Valid names: 0, 1, 2",
    ),
    "class twice in the map": (
        ["KD.LOSSES", "('BoundedRegression',)", "KD.TEACHER.CLASS_MAP", "[['0', 1], ['2', 1]]"],
        "KD.TEACHER.CLASS_MAP has 1 twice",
    ),
    "masks of a student without": (["KD.LOSSES", "('MaskSoftTarget',)"], "MODEL.MASK_ON.; the student has none"),
    "keypoints of a teacher without": (
        ["KD.LOSSES", "('KeypointSoftTarget',)", "MODEL.KEYPOINT_ON", "True"],
        "MODEL.KEYPOINT_ON.; the teacher has none",
    ),
    "no dense head": (
        ["KD.LOSSES", "('DenseSoftTarget',)"],
        "DenseSoftTargetLoss compares two heads at the same anchors: the student GeneralizedRCNN has no dense head",
    ),
    "nothing to cross": (["KD.LOSSES", "('CrossKD',)"], "CrossKDLoss .* GeneralizedRCNN has no dense head"),
    "no RPN": (
        ["KD.LOSSES", "('RPNSoftTarget',)", "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"],
        "the student GeneralizedRCNN has no RPN",
    ),
    "other anchors": (
        ["KD.LOSSES", "('RPNSoftTarget',)", "MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [64], [96]]"],
        "the student's anchors of level 4 are .*96x96.* at stride 64, the teacher's .*128x128.* at stride 64",
    ),
    "taps of a loss that finds its own": (
        ["KD.LOSSES", "('RPNSoftTarget',)", "KD.RPN_SOFT_TARGET.STUDENT_TAPS", "('p2',)"],
        "RPNSoftTargetLoss chooses the taps in the heads itself, found \\('p2',\\)",
    ),
    "unknown distance of boxes": (
        ["KD.LOSSES", "('RPNSoftTarget',)", "KD.RPN_SOFT_TARGET.BOX_LOSS", "l2"],
        "Unknown kind of dense_box_loss 'l2'. Did you mean 'l1'",
    ),
    # The student.
    "unknown meta-architecture": (["MODEL.META_ARCHITECTURE", "Destiller"], "Did you mean 'Distiller'"),
    "unknown student": (["KD.STUDENT.META_ARCHITECTURE", "FasterRCNN"], "KD.STUDENT.META_ARCHITECTURE 'FasterRCNN'"),
    "Distiller of a Distiller": (["KD.STUDENT.META_ARCHITECTURE", "Distiller"], "KD.STUDENT.META_ARCHITECTURE"),
    "unknown backbone": (["MODEL.BACKBONE.NAME", "build_nothing"], "build_nothing"),
    "unknown norm": (["MODEL.RESNETS.NORM", "XN"], "XN"),
    "no class": (["MODEL.ROI_HEADS.NUM_CLASSES", "0"], "NUM_CLASSES"),
    "too few classes": (["MODEL.ROI_HEADS.NUM_CLASSES", "2"], "has 3 classes and MODEL.ROI_HEADS.NUM_CLASSES is 2"),
    "level that is not there": (["MODEL.RPN.IN_FEATURES", "['p2', 'p9']"], "p9"),
    "no pixel mean": (["MODEL.PIXEL_MEAN", "[]"], "PIXEL_MEAN"),
    "pixel std of 0": (["MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]"], "PIXEL_STD"),
    "masks that the data lack": (
        ["MODEL.MASK_ON", "True"],
        "MODEL.MASK_ON needs 'segmentation' of every object; one has .*bbox",
    ),
    "missing initial weights": (["MODEL.WEIGHTS", "nowhere.pkl"], "MODEL.WEIGHTS.* do not exist: 'nowhere.pkl'"),
    "not a device": (["MODEL.DEVICE", "gpu"], "'gpu' is not a device"),
    "no such device": (["MODEL.DEVICE", "cuda:0"], "finds no GPU"),
    # The data.
    "unknown data set": (["DATASETS.TRAIN", "('tini',)"], "Unknown data set 'tini'. Did you mean 'tiny'"),
    "unknown test set": (["DATASETS.TEST", "('tini',)"], "Unknown data set 'tini'"),
    "no training set": (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
    "unknown sampler": (["DATALOADER.SAMPLER_TRAIN", "Random"], "Random"),
    "negative workers": (["DATALOADER.NUM_WORKERS", "-1"], "DATALOADER.NUM_WORKERS must not be negative"),
    "unknown image format": (["INPUT.FORMAT", "XYZ"], "XYZ"),
    "no size": (["INPUT.MIN_SIZE_TRAIN", "()"], r"the input .INPUT.\*. cannot be built"),
    "negative size": (["INPUT.MIN_SIZE_TRAIN", "(-5,)"], r"the input .INPUT.\*. cannot be built"),
    # The solver.
    "no iteration": (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER must be at least 1, found 0"),
    "half an iteration": (["SOLVER.MAX_ITER", "1.5"], "SOLVER.MAX_ITER"),
    "no image": (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH must be at least 1"),
    "batch for 3 processes": (["SOLVER.REFERENCE_WORLD_SIZE", "3"], "must be divisible by the number of processes, 3"),
    "negative rate": (["SOLVER.BASE_LR", "-0.1"], "SOLVER.BASE_LR must be a positive number, found -0.1"),
    "rate not a number": (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR"),
    "no checkpoint": (["SOLVER.CHECKPOINT_PERIOD", "0"], "SOLVER.CHECKPOINT_PERIOD must be at least 1"),
    "unknown scheduler": (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "Cosine"),
    "huge seed": (["SEED", str(2**40)], "SEED"),
    "no folder": (["OUTPUT_DIR", ""], "OUTPUT_DIR is empty"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option(run, case):
    options, message = OPTIONS[case]
    found = message_of(run, *options)
    assert re.search(message, found), found
    assert len(found) < 1000


def test_a_best_metric_that_evaluation_gives(run):
    for metric in ("bbox/AP", "bbox/APs", "bbox/AP-1"):
        check(run, "KD.BEST_METRIC", metric, "TEST.EVAL_PERIOD", "2")
    args = parse_arguments(argument_parser(), ["--config-file", str(run / "run.yaml"), "KD.BEST_METRIC", "mine"])
    check_run(load_config(args), args)
    assert any("TEST.EVAL_PERIOD 0" in warning for warning in args.warnings)


def test_more_processes_than_the_batch_divides_by(run):
    assert "must be divisible by the number of processes, 3" in message_of(run, "--num-gpus", "3")


# Files.


def config_file(text):
    return lambda run: (run / "run.yaml").write_bytes(text)


def without(path):
    return lambda run: (run / path).unlink()


def annotations(change):
    def apply(run):
        path = run / "images" / "annotations.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))

    return apply


def every_box(**fields):
    return annotations(lambda content: [box.update(fields) for box in content["annotations"]] and None)


def folder_for(path):
    def apply(run):
        (run / path).unlink(missing_ok=True)
        (run / path).mkdir()

    return apply


def file_for_output(run):
    (run / "run.yaml").write_text((run / "run.yaml").read_text().replace(str(run / "out"), str(run / "a" / "out")))
    (run / "a").write_text("a file")


def other_teacher_weights(change):
    def apply(run):
        state = torch.load(run / "teacher.pth")["model"]
        torch.save({"model": change(state) or state}, run / "teacher.pth")

    return apply


def weights_of_another_network(run):
    """The student starts from the wider teacher's weights."""
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace("\n  WEIGHTS: ''", f"\n  WEIGHTS: {run / 'teacher.pth'}"))


def teacher_with_other_levels(run):
    cfg = tiny_cfg(depth=50, width=8)
    text = cfg.dump().replace("build_tiny_fpn_backbone", "build_resnet_backbone")
    (run / "teacher.yaml").write_text(text)


FILES = {
    "config is empty": (config_file(b""), "run.yaml is not a yaml config: expected keys with values, found none"),
    "config is a list": (config_file(b"- 1"), "expected keys with values, found none"),
    "config is broken yaml": (config_file(b"MODEL: ["), "run.yaml is not a yaml config: .*line 1"),
    "config is binary": (config_file(b"\x00\xff\xfe"), "run.yaml is not a yaml config"),
    "config in Latin-1": (config_file("# é\nSEED: 1".encode("latin-1")), "run.yaml is not a yaml config"),
    "config with a typo": (config_file(b"MODEL:\n  DEVISE: cpu"), "Unknown config key 'MODEL.DEVISE'"),
    "config with a value for a section": (config_file(b"MODEL: 3"), "a value stands where Detectron2 has a section"),
    "config with a wrong type": (config_file(b"SEED: 'x'"), "SEED is x, expected a value of type int, such as -1"),
    "config inherits from itself": (config_file(b"_BASE_: run.yaml"), "run.yaml inherits from itself"),
    "config inherits from nothing": (config_file(b"_BASE_: no.yaml"), "run.yaml: _BASE_: the config .*no.yaml does not exist"),
    "config of a future version": (config_file(b"VERSION: 9"), "v9"),
    "weights of another network": (
        weights_of_another_network,
        "another network's than the backbone of the student .MODEL.WEIGHTS., which has 12: 8 misshapen .*; 4 left over",
    ),
    "config is missing": (without("run.yaml"), "run.yaml does not exist"),
    "config is a folder": (folder_for("run.yaml"), "run.yaml is a folder"),
    "teacher's config is empty": (lambda run: (run / "teacher.yaml").write_text(""), "teacher.yaml is not a yaml config"),
    "teacher's config is missing": (without("teacher.yaml"), "teacher.yaml' is neither a file nor in .* model zoo"),
    "teacher's weights are missing": (without("teacher.pth"), "teacher.pth"),
    "teacher's weights are empty": (lambda run: (run / "teacher.pth").write_bytes(b""), "teacher.pth .0 bytes. is truncated"),
    "teacher's weights are half": (
        lambda run: os.truncate(run / "teacher.pth", os.path.getsize(run / "teacher.pth") // 2),
        "teacher.pth .* is truncated",
    ),
    "teacher's weights are a folder": (folder_for("teacher.pth"), "teacher.pth"),
    "a weight is missing": (other_teacher_weights(lambda s: s.pop("backbone.fpn_output2.weight") is None), "1 missing .backbone.fpn_output2.weight"),
    "a weight is left over": (other_teacher_weights(lambda s: s.update(more=torch.zeros(1))), "1 unexpected .more"),
    "a weight has another shape": (
        other_teacher_weights(lambda s: s.update({"backbone.fpn_output2.bias": torch.zeros(3)})),
        r"backbone.fpn_output2.bias is \(3,\), expected \(8,\)",
    ),
    "a weight is not a number": (
        other_teacher_weights(lambda s: s.update({"backbone.fpn_output2.bias": torch.full((8,), torch.nan)})),
        "backbone.fpn_output2.bias",
    ),
    "teacher has other levels": (teacher_with_other_levels, "Unknown tap of the teacher 'p2'|cannot be built"),
    "annotations are missing": (without("images/annotations.json"), "annotations.json: No such file"),
    "annotations are empty": (lambda run: (run / "images/annotations.json").write_text(""), "not a readable JSON"),
    "annotations are binary": (lambda run: (run / "images/annotations.json").write_bytes(b"\xff\x00"), "not a readable JSON"),
    "annotations are a folder": (folder_for("images/annotations.json"), "annotations.json"),
    "annotations are a list": (annotations(lambda content: [1]), "tiny"),
    "no image": (annotations(lambda content: content.update(images=[], annotations=[])), "tiny"),
    "no annotation": (annotations(lambda content: content.update(annotations=[])), "no annotation to train on"),
    "no categories": (annotations(lambda content: content.pop("categories") and None), "tiny"),
    "box of 3 numbers": (every_box(bbox=[1, 2, 3]), "expected a box of 4 finite numbers, found .1, 2, 3"),
    "box of words": (every_box(bbox=["a", 1, 2, 3]), "expected a box of 4 finite numbers"),
    "box that is not a number": (every_box(bbox=[float("nan"), 1, 2, 3]), "expected a box of 4 finite numbers"),
    "unknown category": (every_box(category_id=17), "17"),
    "image is missing": (without("images/3.png"), "1 of 8 images are missing, the first is .*3.png"),
    "image is empty": (lambda run: (run / "images/3.png").write_bytes(b""), "3.png cannot be read"),
    "image is text": (lambda run: (run / "images/3.png").write_text("<html>"), "3.png cannot be read"),
    "image is half": (lambda run: os.truncate(run / "images/3.png", 2000), "3.png cannot be read"),
    "image has another size": (
        lambda run: cv2.imwrite(str(run / "images/3.png"), np.zeros((9, 9, 3), np.uint8)),
        "3.png cannot be read .Mismatched image shape",
    ),
    "image is a bomb": (lambda run: write_png(run / "images/3.png", 1 << 30, 1 << 30), "3.png cannot be read .Image size"),
    "image is a bomb of text": (lambda run: write_png(run / "images/3.png", 48, 64, text=1 << 26), "3.png cannot be read .Decompressed"),
    "image name with a NUL": (
        annotations(lambda content: content["images"][3].update(file_name="3\0.png")), "1 of 8 images are missing"),
    "annotations are absurdly large": (
        lambda run: os.truncate(run / "images/annotations.json", 1 << 42), "annotations.json has 4,398,046,511,104 bytes"),
    "annotations nested without end": (
        lambda run: (run / "images/annotations.json").write_text("[" * 100_000), "annotations.json"),
    "annotations in UTF-16": (
        lambda run: (run / "images/annotations.json").write_bytes('{"images": []}'.encode("utf-16")), "not a readable JSON"),
    "annotation ids twice": (every_box(id=1), "annotations.json.* are not unique"),
    "box is nothing": (every_box(bbox=None), "tiny"),
    "image width is a word": (annotations(lambda content: content["images"][3].update(width="wide")), "expected a number as 'width', found 'wide'"),
    "image without a width": (annotations(lambda content: content["images"][3].pop("width") and None), "width"),
    "image is a folder": (folder_for("images/3.png"), "3.png cannot be read"),
    "teacher's weights are a web page": (
        lambda run: (run / "teacher.pth").write_text("<!DOCTYPE html>"), "teacher.pth .* is truncated or not a checkpoint"),
    "teacher's weights unpack to too much": (lambda run: compress(run / "teacher.pth"), "teacher.pth .* it unpacks to "),
    "output is below a file": (file_for_output, "/a' is not a folder"),
}  # fmt: skip


def write_png(path, width: int, height: int, *, text: int = 0):
    """A PNG without pixels, of the announced size, and with a compressed text of so many characters."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    chunks = [(b"IHDR", header), (b"zTXt", b"a\0\0" + zlib.compress(bytes(text))), (b"IDAT", b""), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*x) for x in chunks))


def compress(path):
    with zipfile.ZipFile(path) as old:
        content = {item.filename: old.read(item) for item in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data if not name.endswith("/data/0") else bytes(1 << 24))


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file(run, case):
    change, message = FILES[case]
    change(run)
    found = message_of(run)
    assert re.search(message, found), found
    assert len(found) < 1000


def test_there_are_enough_cases():
    assert len(OPTIONS) + len(FILES) >= 100


# Odd, and right.


def save_exif_rotated(path):
    """As a camera held upright writes it: 64x48 pixels that are to be shown as 48x64."""
    image = Image.fromarray(np.zeros((48, 64, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


ODD = {
    "grayscale": lambda path: Image.fromarray(np.zeros((64, 48), np.uint8)).save(path),
    "RGBA": lambda path: Image.fromarray(np.zeros((64, 48, 4), np.uint8)).save(path),
    "palette": lambda path: Image.fromarray(np.zeros((64, 48), np.uint8)).convert("P").save(path),
    "16 bit": lambda path: cv2.imwrite(str(path), np.full((64, 48), 40_000, np.uint16)),
    "16 bit RGB": lambda path: cv2.imwrite(str(path), np.full((64, 48, 3), 40_000, np.uint16)),
    "1 bit": lambda path: Image.new("1", (48, 64)).save(path),
    "CMYK JPEG": lambda path: Image.new("CMYK", (48, 64)).save(path, format="JPEG"),
    "WebP": lambda path: Image.new("RGB", (48, 64)).save(path, format="WEBP"),
    "EXIF rotation": save_exif_rotated,
}


@pytest.mark.parametrize("case", ODD)
def test_odd_images_are_trained_on(run, case):
    for i in (1, 3, 5, 7):
        ODD[case](run / "images" / f"{i}.png")
    check(run)
    args = parse_arguments(argument_parser(), ["--config-file", str(run / "run.yaml"), "SOLVER.MAX_ITER", "2"])
    cfg = load_config(args).clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ()
    train(cfg)


def test_zero_area_boxes_empty_images_and_extreme_shapes_are_trained_on(run):
    cv2.imwrite(str(run / "images/0.png"), np.zeros((1, 1, 3), np.uint8))
    cv2.imwrite(str(run / "images/2.png"), np.zeros((1, 100, 3), np.uint8))
    cv2.imwrite(str(run / "images/4.png"), np.zeros((900, 700, 3), np.uint8))

    def change(content):
        for i, (height, width) in {0: (1, 1), 2: (1, 100), 4: (900, 700)}.items():
            content["images"][i].update(height=height, width=width)
        for box in content["annotations"]:
            if box["image_id"] in (0, 2, 4):
                box["bbox"] = [0, 0, 1, 1]
            if box["image_id"] == 1:
                box["bbox"] = [5, 5, 0, 0]
        content["annotations"] = [box for box in content["annotations"] if box["image_id"] != 3]

    annotations(change)(run)
    check(run)
    cfg = load_config(parse_arguments(argument_parser(), ["--config-file", str(run / "run.yaml")])).clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ()
    cfg.INPUT.MAX_SIZE_TRAIN = 128
    train(cfg)


def test_an_image_that_breaks_later_is_named_in_one_line(run, caplog):
    cfg = load_config(parse_arguments(argument_parser(), ["--config-file", str(run / "run.yaml")])).clone()
    cfg.defrost()
    for workers in (0, 2):
        write_coco(run / "images")
        cfg.DATALOADER.NUM_WORKERS = workers
        cfg.OUTPUT_DIR = str(run / f"out{workers}")
        for i in range(8):
            (run / "images" / f"{i}.png").write_bytes(b"")
        with pytest.raises(ValueError, match=r"image .*/\d.png cannot be read") as e:
            train(cfg)
        assert "Traceback" not in str(e.value)
    assert not any(record.exc_info for record in caplog.records)


# The whole way, once.


def test_the_tool_says_one_line_and_writes_nothing(run):
    tool = str(ROOT / "tests" / "tiny_train_net.py")
    command = [sys.executable, "-W", "ignore", tool, "--config-file", str(run / "run.yaml"), "KD.LOSSES", "('NTS',)"]
    env = {**os.environ, "TINY_DATA": str(run / "images")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=run)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "CUDA" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: Unknown distillation loss 'NTS'"), done.stderr
    assert not (run / "out").exists()
