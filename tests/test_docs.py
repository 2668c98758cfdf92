"""The documentation: it builds without a warning or a dead link, its examples run, and no loss is left out."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from kd_det import DISTILLATION_LOSS_REGISTRY
from kd_det.cli.compare import main as compare
from tests.test_readme import ROOT, blocks

DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "notebooks" / "distillation.ipynb"


def python(*arguments, cwd=ROOT, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("Sphinx is not installed")
    folder = tmp_path_factory.mktemp("site")
    python("-m", "sphinx", "--nitpicky", "--fail-on-warning", "--keep-going", "-q", "-b", "html", "docs", folder)
    return folder


def test_the_site_has_every_key_and_command(site):
    keys = (site / "config.html").read_text()
    for key in ("KD.NST.KERNEL", "KD.TEACHER.CLASS_MAP", "CLASSIFICATION.AUG.MIXUP", "MODEL.TIMM.NAME"):
        assert key in keys
    assert "d of the polynomial kernel" in keys
    assert "usage: kd-det evaluate-teacher" in (site / "commands.html").read_text()
    assert "kd_det.losses.nst_loss" in (site / "api" / "losses.html").read_text()


def test_every_loss_has_a_formula():
    text = (DOCS / "losses.md").read_text()
    missing = {name for name, loss in DISTILLATION_LOSS_REGISTRY if f"`KD.{loss.name.upper()}`" not in text}
    assert not {name for name in missing if DISTILLATION_LOSS_REGISTRY.get(name).__module__.startswith("kd_det.")}


def test_pictures_are_small_and_used():
    pages = "".join(path.read_text() for path in DOCS.rglob("*.md"))
    pictures = list((DOCS / "pictures").iterdir())
    assert all(f"pictures/{path.name}" in pages and path.stat().st_size < 100_000 for path in pictures)
    assert sum(path.stat().st_size for path in pictures) < 1_000_000


def test_python_blocks_compile():
    for page in DOCS.rglob("*.md"):
        for code in blocks(str(page.relative_to(ROOT)), "python"):
            compile(code, str(page), "exec")


def test_a_backbone_of_ones_own(monkeypatch):
    monkeypatch.setattr(BACKBONE_REGISTRY, "_obj_map", dict(BACKBONE_REGISTRY._obj_map))
    (code,) = blocks("docs/extending.md", "python")
    exec(code, example := {})
    backbone = BACKBONE_REGISTRY.get("TinyBackbone")(get_cfg(), ShapeSpec(channels=3))
    level = backbone(torch.zeros(1, 3, 32, 40))["p3"]
    assert level.shape == (1, 64, 4, 5) and example["TinyBackbone"] is type(backbone)


def cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs():
    for cell in cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), str(NOTEBOOK), "exec")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    (tmp_path / "notebook.py").write_text("\n".join("".join(cell["source"]) for cell in cells()))
    output = python("notebook.py", cwd=tmp_path, MPLBACKEND="agg")
    assert "config.yaml" in output.splitlines()[-1] and "distilled" in output


@pytest.fixture
def trees(tmp_path):
    """Two small photographs under the real ones' names: a tree of 30x20 pixels at (130, 10), on a tile's border."""
    source = tmp_path / "photographs"
    source.mkdir()
    box = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (130, 10, 160, 30)))
    for name in re.findall(r"2019_YELL\w+", (DOCS / "trees" / "trees.py").read_text()):
        cv2.imwrite(str(source / f"{name}.png"), np.full((144, 288, 3), 90, np.uint8))
        xml = f"<annotation><object><name>Tree</name><bndbox>{box}</bndbox></object></annotation>"
        (source / f"{name}.xml").write_text(xml)
    output = python("docs/trees/trees.py", source, tmp_path / "datasets" / "trees")
    assert output.splitlines() == ["train: 3 tiles, 2 trees", "val: 2 tiles, 1 trees"]
    return tmp_path / "datasets"


def test_photographs_become_tiles(trees):
    coco = json.loads((trees / "trees" / "val.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["0000_0000.png", "0000_0144.png"]
    # 14 of the tree's 30 columns lie in the first tile, which is less than half; 16 in the second.
    assert [(x["image_id"], x["bbox"]) for x in coco["annotations"]] == [(2, [0, 10.0, 16.0, 20.0])]


@pytest.mark.slow
def test_your_own_data_from_start_to_end(trees, tmp_path, monkeypatch):
    """The page's trainings, for two steps each, and what comes after them."""
    shell = [code for code in blocks("docs/own_data.md", "") if "kd-det train" in code]
    assert shell
    for code in shell:
        for line in code.replace("\\\n", " ").splitlines():
            words = line.replace("output/trees", str(tmp_path / "runs")).split()
            if words[:2] == ["kd-det", "train"]:
                if "OUTPUT_DIR" not in words:
                    config = words[words.index("--config-file") + 1]
                    name = {"docs/trees/teacher.yaml": "teacher", "docs/trees/student.yaml": "alone"}[config]
                    words += ["OUTPUT_DIR", str(tmp_path / "runs" / name)]
                python("-m", "kd_det", *words[1:], "SOLVER.MAX_ITER", "2", DETECTRON2_DATASETS=str(trees))
    monkeypatch.chdir(tmp_path)
    runs = [f"{name}={tmp_path / 'runs' / name}" for name in ("teacher", "alone", "distilled")]
    compare([*runs, "--output", "comparison"])
    assert Path("comparison", "table.md").is_file()
