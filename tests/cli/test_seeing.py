"""kd-det visualize, compare and report, on runs of a tiny detector."""

import html
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import cv2
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_det.cli import compare, report, visualize
from kd_det.study.run_config import used_config
from tests.tiny_run import run_cfg, train


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two runs of two steps, evaluated: "alone", and "taught" by NST and OFD."""
    folder = tmp_path_factory.mktemp("trained")
    opts = {"SOLVER__MAX_ITER": 2, "SOLVER__STEPS": (1,), "KD__NST__STUDENT_TAPS": ("p3",)}
    opts |= {"KD__OVERHAUL__STUDENT_TAPS": ("res5.pre_activation",), "TEST__EVAL_PERIOD": 1}
    for name, losses in (("taught", ("NST", "Overhaul")), ("alone", ())):
        cfg = run_cfg(folder, *losses, OUTPUT_DIR=str(folder / name), **opts)
        cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
        if not losses:
            cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
        train(cfg)
        (folder / name / "config.yaml").write_text(used_config(cfg).dump())
    return folder


def error_of(main, argv, capsys) -> str:
    with pytest.raises(SystemExit):
        main([str(x) for x in argv])
    return capsys.readouterr().err


def test_visualize_draws_every_image_and_tap(trained, tmp_path, capsys):
    taught = trained / "taught"
    argv = ["--config-file", taught / "config.yaml", "--num", 1]  # its weights lie beside it
    visualize.main([str(x) for x in [*argv, "--min-score", 0.1, "--output", tmp_path / "pictures"]])
    found = sorted(str(path.relative_to(tmp_path / "pictures")) for path in (tmp_path / "pictures").rglob("*.png"))
    each = ["{}.png", "{}/detections.png", "{}/p3.png", "{}/res5.pre_activation.png"]
    assert found == sorted(["contact_sheet.png", *(name.format("000_0") for name in each)])
    sheet, one = (cv2.imread(str(tmp_path / "pictures" / name)) for name in ("000_0.png", "000_0/p3.png"))
    assert sheet.shape[1] == one.shape[1] > 1500 and sheet.shape[0] > 2 * one.shape[0] > 1000
    assert "1 images, 2 taps" in capsys.readouterr().out


def test_visualize_of_a_file_with_plain_weights_alone(trained, tmp_path, capsys):
    """A checkpoint that holds weights only, an image of no data set, two checkpoints, a tap by name."""
    state = torch.load(trained / "alone/model_final.pth", weights_only=True)["model"]
    torch.save(dict(state), tmp_path / "plain.pth")
    argv = ["--config-file", trained / "alone/config.yaml", "--weights", tmp_path / "plain.pth", "--taps", "res3"]
    argv += ["--images", trained / "images/0.png", "--before", trained / "alone/model_0000001.pth"]
    visualize.main([str(x) for x in [*argv, "--output", tmp_path / "pictures", "DATASETS.TEST", "()"]])
    assert (tmp_path / "pictures/000_0/res3.png").is_file()


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--taps", "p9"], "Unknown tap of the student 'p9'"),
        (["--images", "no.jpg"], "--images: no.jpg does not exist"),
        (["--weights", "no.pth"], "no.pth"),
        (["--num", "0"], "--num must be at least 1, found 0"),
        (["--before", "no.pth"], "no.pth"),
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty: name images by --images"),
        (["DATASETS.TEST", "('no_set',)"], "Unknown data set 'no_set'"),
        (["MODEL.META_ARCHITECTURE", "ImageClassifier"], "draws detectors, and this config is a classifier's"),
    ],
)
def test_visualize_says_what_is_wrong(trained, tmp_path, capsys, argv, message):
    base = ["--config-file", trained / "alone/config.yaml", "--weights", trained / "alone/model_final.pth"]
    assert message in error_of(visualize.main, [*base, "--output", tmp_path / "pictures", *argv], capsys)
    assert not (tmp_path / "pictures").exists()


def test_visualize_without_weights_says_where_it_looked(trained, tmp_path, capsys):
    shutil.copy(trained / "alone/config.yaml", tmp_path / "config.yaml")
    error = error_of(visualize.main, ["--config-file", tmp_path / "config.yaml"], capsys)
    assert f"there is no {tmp_path / 'model_final.pth'}" in error


def test_compare_writes_tables_and_curves(trained, tmp_path, capsys):
    alone, taught = trained / "alone", trained / "taught"
    compare.main([str(x) for x in (f"seeds={alone},{alone}", taught, "--output", tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "table.txt", "table.md", "table.csv", "curves.png", "curves.svg"
    }  # fmt: skip
    rows = (tmp_path / "out/table.csv").read_text().splitlines()
    assert rows[0].startswith("run,steps,AP,AP50") and rows[1].startswith("seeds,2,") and "± 0.0" in rows[1]
    assert rows[2].endswith('"NST 20, Overhaul 0.001"')
    gflops = float(rows[1].rsplit(",", 3)[1])
    assert 0.001 < gflops < 0.1  # a backbone of width 4 at 48 x 80
    assert "curves.svg" in capsys.readouterr().out


def test_runs_that_are_none(trained, tmp_path, capsys):
    assert "holds no run: expected a folder with a metrics.json" in error_of(compare.main, [tmp_path], capsys)
    twice = [trained / "alone", trained / "alone"]
    assert "two runs are named 'alone': name them" in error_of(compare.main, twice, capsys)


class Page(HTMLParser):
    """Checks that tags are closed in order; collects what is linked, and the text."""

    VOID = {"meta", "img", "br", "wbr"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.links, self.text, self.ids = [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in self.VOID else [tag]
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href")]
        self.ids += [value for key, value in attributes if key == "id"]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open = self.open[:-1] if tag not in self.VOID else self.open

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


@pytest.fixture(scope="module")
def page(trained) -> str:
    path = trained / "report.html"
    report.main([str(x) for x in (trained / "alone", trained / "taught", "--out", path, "--num", 3)])
    return path.read_text()


def test_the_report_holds_everything_it_shows(page):
    parsed = Page(page)
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in parsed.links), "needs a network"
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)
    for text in ("AP by class", "loss_nst", "share of each loss", "KD.NST.STUDENT_TAPS", "Attention", "Detections"):
        assert text in parsed.text or text in page
    assert "Command and versions are left out" in parsed.text
    assert "Teacher and student are not compared image by image: the run has no teacher" in parsed.text
    assert len([link for link in parsed.links if link.startswith("data:")]) >= 2 * 2 + 2 * 3


def test_a_report_of_a_folder_that_was_copied_alone(trained, tmp_path):
    """Without the data, the teacher and the log, and then without config and weights."""
    for name in ("metrics.json", "config.yaml", "model_final.pth"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(trained / "taught" / name, tmp_path / "copy" / name)
    config = tmp_path / "copy/config.yaml"
    config.write_text(config.read_text().replace("teacher.pth", "gone.pth"))
    report.main([str(tmp_path / "copy"), "--out", str(tmp_path / "report.html")])
    text = Page((tmp_path / "report.html").read_text()).text
    assert "Teacher and student are not compared image by image" in text and "gone.pth" in text and "Detections" in text
    config.write_text(re.sub(r"(TEST:\s*- )tiny", r"\1gone_set", config.read_text()))
    report.main([str(tmp_path / "copy"), "--out", str(tmp_path / "report.html")])
    text = Page((tmp_path / "report.html").read_text()).text
    assert "Pictures are left out: Unknown data set 'gone_set'" in text
    config.unlink()
    report.main([str(tmp_path / "copy"), "--out", str(tmp_path / "report.html")])
    assert "Pictures are left out: the config" in (tmp_path / "report.html").read_text()


def test_the_report_names_a_plain_detector_and_its_changed_keys_only(page):
    parsed = Page(page)
    alone, taught = parsed.text.split("Config: ")[0], parsed.text.split("Config: ")[1]
    assert "detector" in alone and "student\n" not in alone.split("folder")[1] and "student\n" in taught
    assert "MODEL.ROI_BOX_CASCADE_HEAD" not in parsed.text  # a tuple of lists where the default has tuples


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
@pytest.mark.parametrize("width", [390, 1100])
def test_no_part_of_the_page_is_wider_than_the_screen(page, tmp_path, width):
    frame = f'<iframe srcdoc="{html.escape(page)}" style="width: {width}px; height: 800px; border: 0" onload="'
    frame += "const root = this.contentDocument.documentElement; document.title = root.scrollWidth - root.clientWidth"
    (tmp_path / "frame.html").write_text(f'<title></title>{frame}"></iframe>')
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/frame.html"]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "LANG": "C"})
    assert "<title>0</title>" in dumped.stdout, dumped.stdout[:200] + dumped.stderr[-500:]


@pytest.mark.slow
def test_a_run_with_vis_period_writes_pictures_for_tensorboard(trained, tmp_path):
    root = Path(__file__).parents[2]
    argv = ["--config-file", str(trained / "taught/config.yaml"), "--import", "tiny_data.py"]
    options = ["VIS_PERIOD", "2", "TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / "out")]
    (tmp_path / "tiny_data.py").write_text(
        "import tests.tiny\nfrom detectron2.data.datasets import register_coco_instances as register\n"
        f"register('tiny', {{}}, '{trained}/images/annotations.json', '{trained}/images')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "kd_det", "train", *argv, *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-2000:]
    events = EventAccumulator(str(tmp_path / "out"), size_guidance={"images": 0}).Reload()
    pictures = [tag for tag in events.Tags()["images"] if tag.startswith("distillation/")]
    assert sorted(pictures) == ["distillation/image_0", "distillation/image_1"]
    assert events.Images(pictures[0])[0].width > 1500
    assert re.search(r"Command: \S+ .*--config-file .*VIS_PERIOD 2", (tmp_path / "out/log.txt").read_text())
