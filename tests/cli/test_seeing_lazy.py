"""kd-det visualize, compare and report, on what kd-det lazy-train leaves in its folder."""

import csv
import re
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from kd_det.cli import compare, export, lazy_train, report, visualize
from kd_det.teachers.sources import teacher_source
from tests.tiny import tiny_fcos
from tests.tiny_run import in_process, write_coco

DATA = """
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
if "lazy_tiny" not in DatasetCatalog:
    register_coco_instances("lazy_tiny", {{}}, "{folder}/images/annotations.json", "{folder}/images")
"""
CONFIG = """
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from detectron2.data import get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch.optim import SGD
from kd_det import Distiller
from kd_det.losses import HintLoss, PKDLoss
from kd_det.teachers import load_teacher
from tests.tiny import tiny_fcos

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="lazy_tiny"),
        mapper=L(DatasetMapper)(is_train=True, augmentations=[], image_format="BGR"),
        total_batch_size=2,
        num_workers=0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="lazy_tiny", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=48)],
            image_format="${...train.mapper.image_format}",
        ),
        num_workers=0,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="${..test.dataset.names}"),
)
model = MODEL
optimizer = L(SGD)(params=L(get_default_optimizer_params)(), lr=0.001)
lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[1, 2])
train = dict(
    output_dir="out", init_checkpoint="", max_iter=2, amp=dict(enabled=False), ddp={}, device="cpu", seed=3,
    checkpointer=dict(period=2, max_to_keep=9), eval_period=2, log_period=1,
)
"""
DISTILLER = """L(Distiller)(
    student=L(tiny_fcos)(),
    teacher=L(load_teacher)(model=L(tiny_fcos)(width=8), weights="FOLDER/teacher.pth"),
    losses=[L(PKDLoss)(student_taps=["p3"], weight=2.0), L(HintLoss)(student_taps=["p4"], weight=0.5)],
)"""


@pytest.fixture(autouse=True)
def storage():
    """The training opens its own."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of two steps: "alone", "taught" by the LazyConfig itself, "named" by --teacher; all with --import."""
    folder = tmp_path_factory.mktemp("lazy")
    write_coco(folder / "images", images=4)
    (folder / "lazy_tiny_data.py").write_text(DATA.format(folder=folder))
    torch.save({"model": tiny_fcos(width=8).state_dict()}, folder / "teacher.pth")
    models = {"alone": "L(tiny_fcos)()", "named": "L(tiny_fcos)()", "teacher": "L(tiny_fcos)(width=8)"}
    models["taught"] = DISTILLER.replace("FOLDER", str(folder))
    for name, model in models.items():
        (folder / f"{name}.py").write_text(CONFIG.replace("MODEL", model))
    for name in ("alone", "taught", "named"):
        argv = ["--import", folder / "lazy_tiny_data.py", "--config-file", folder / f"{name}.py"]
        if name == "named":
            argv += ["--teacher", folder / "teacher.py", "--teacher-weights", folder / "teacher.pth"]
        assert not in_process(lazy_train.main, [str(x) for x in [*argv, f"train.output_dir={folder / name}"]])
    return folder


@pytest.mark.parametrize("name, taps", [("alone", "p3"), ("taught", "p4"), ("named", "p3")])
def test_visualize_draws_the_run_in_a_folder(trained, tmp_path, name, taps):
    argv = ["--config-file", trained / name / "config.yaml", "--num", 1, "--output", tmp_path / "pictures"]
    visualize.main([str(x) for x in argv])
    found = {path.stem for path in (tmp_path / "pictures/000_0").iterdir()}
    assert {"detections", taps} <= found
    assert name != "taught" or found == {"detections", "p3", "p4"}


def test_visualize_of_the_lazy_config_itself(trained, tmp_path):
    argv = ["--config-file", trained / "taught.py", "--weights", trained / "taught/model_final.pth", "--num", 1]
    visualize.main([str(x) for x in [*argv, "--import", trained / "lazy_tiny_data.py", "--output", tmp_path / "out"]])
    assert (tmp_path / "out/000_0/p4.png").is_file()


def test_compare_counts_the_students_and_names_the_losses(trained, tmp_path):
    compare.main([str(x) for x in (*(trained / name for name in ("alone", "taught", "named")), "--output", tmp_path)])
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["losses"] for row in rows] == ["-", "PKD 2, Hint 0.5", "PKD 6"]
    assert {row["parameters"] for row in rows} == {f"{sum(p.numel() for p in tiny_fcos().parameters()):,}"}
    assert all(0.0001 < float(row["GFLOPs"]) < 0.01 for row in rows)  # at 48 x 80, as the test mapper resizes


def page_of(folder, tmp_path) -> str:
    report.main([str(x) for x in (folder, "--num", 2, "--out", tmp_path / "report.html")])
    return (tmp_path / "report.html").read_text()


def test_the_report_has_pictures_command_and_config(trained, tmp_path):
    page = page_of(trained / "taught", tmp_path)
    assert "left out" not in page and "Attention" in page and "Detections" in page
    assert "not compared" not in page
    assert "<h3>Command</h3>" in page
    assert "dataloader.test.mapper.augmentations.0.short_edge_length" in page.replace("<wbr>", "")
    assert "<th>default</th>" not in page  # a LazyConfig has none


def test_a_teacher_that_is_gone_leaves_the_student(trained, tmp_path):
    config = trained / "taught/config.yaml"
    copied = tmp_path / "copy"
    copied.mkdir()
    for name in ("metrics.json", "model_final.pth"):
        (copied / name).write_bytes((trained / "taught" / name).read_bytes())
    (copied / "config.yaml").write_text(config.read_text().replace("teacher.pth", "gone.pth"))
    page = page_of(copied, tmp_path)
    assert re.search("not compared image by image: .*gone.pth", page) and "Detections" in page


def test_what_the_yaml_of_a_lazy_config_lacks(trained, tmp_path, capsys):
    """A function that the .py defined, and no mapper: said before anything is drawn."""
    cfg = OmegaConf.load(trained / "alone/config.yaml")
    argv = ["--weights", str(trained / "alone/model_final.pth"), "--output", str(tmp_path / "pictures")]
    wrong = [("model._target_", "builtins.my_detector", "my_detector.* the .py file")]
    wrong += [("dataloader.test.mapper", None, "no dataloader.test.mapper")]
    wrong += [("dataloader.test.dataset", None, "no dataloader.test.dataset.*--images")]
    for key, value, message in wrong:
        changed = cfg.copy()
        OmegaConf.update(changed, key, value)
        OmegaConf.save(changed, tmp_path / "config.yaml")
        with pytest.raises(SystemExit):
            visualize.main(["--config-file", str(tmp_path / "config.yaml"), *argv])
        error = capsys.readouterr().err
        assert re.search(message, error.replace("\n", " ")), error
    assert not (tmp_path / "pictures").exists()


def test_compare_says_what_it_leaves_out(trained, tmp_path, capsys):
    copied = tmp_path / "copy"
    shutil.copytree(trained / "alone", copied)
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("tests.tiny.tiny_fcos", "builtins.my_detector"))
    compare.main([str(copied), "--output", str(tmp_path / "out")])
    assert re.search("copy: its row is left incomplete: .*my_detector.* the .py file", capsys.readouterr().out)


def test_the_yaml_in_the_folder_serves_other_commands(trained, tmp_path):
    """It is exported, and it teaches."""
    config, weights = trained / "named/config.yaml", trained / "named/model_final.pth"
    argv = ["--config-file", config, "--weights", weights, "--output", tmp_path / "plain"]
    export.main([str(x) for x in argv])
    assert (tmp_path / "plain/model.pth").is_file()
    assert type(teacher_source(str(config))).__name__ == "LazyTeacher"
