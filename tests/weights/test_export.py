import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

import kd_det.weights.export
from kd_det import student_cfg
from kd_det.weights.export import export_student
from tests.tiny import tiny_cfg

LEVELS = ["res2", "res3", "res4", "res5"]
ALONE = """
import sys
sys.modules["kd_det"] = None
{first}
import torch
torch.set_num_threads(1)
{snippet}
state = torch.load("model.pth", weights_only=True)["model"]
predictor.model.load_state_dict(state, strict=True)
print("DETECTED", len(instances), instances.scores.sum().item())
"""


def standard_cfg(**opts):
    """Detectron2's own R-18: what a folder without kd_det must be able to build. No data set names its classes."""
    cfg = tiny_cfg(
        DATASETS__TRAIN=(),
        depth=18,
        width=64,
        MODEL__BACKBONE__NAME="build_resnet_fpn_backbone",
        MODEL__RESNETS__OUT_FEATURES=LEVELS,
        MODEL__FPN__IN_FEATURES=LEVELS,
        INPUT__MIN_SIZE_TEST=64,
    )
    for key, value in opts.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def checkpoint(cfg, path):
    torch.manual_seed(4)
    model = build_model(student_cfg(cfg))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    torch.save({"model": model.state_dict(), "iteration": 7}, path)
    return model.eval()


def run_alone(folder, first=""):
    """The README's own snippet in a process that cannot import kd_det, on an image of ones."""
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    image = "import numpy\nimage = numpy.ones((64, 96, 3), dtype=numpy.uint8)\n"
    code = ALONE.format(first=first, snippet=image + snippet)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, total = done.stdout.split("DETECTED ")[1].split()
    return int(count), float(total)


def test_the_folder_is_plain_detectron2(tmp_path):
    cfg = standard_cfg()
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    model = checkpoint(cfg, tmp_path / "model_final.pth")
    report = export_student(cfg, str(tmp_path / "model_final.pth"), str(tmp_path / "out"), trace=True)
    assert report.files == ("config.yaml", "model.pth", "model.ts", "README.md")
    assert report.feature_error == 0 and report.num_detections[0] == report.num_detections[1] > 0
    assert report.needs == () and "They need Detectron2, not kd_det." in (tmp_path / "out/README.md").read_text()
    text = (tmp_path / "out/config.yaml").read_text()
    assert "KD:" not in text and "TIMM:" not in text and "CLASSIFICATION" not in text

    count, total = run_alone(tmp_path / "out")
    image = torch.ones(3, 64, 96)
    with torch.no_grad():
        want = model([{"image": image, "height": 64, "width": 96}])[0]["instances"]
    assert count == len(want) and total == pytest.approx(want.scores.sum().item(), rel=1e-5)

    boxes, *rest = torch.jit.load(tmp_path / "out/model.ts")(image)
    with torch.no_grad():
        fields = model.inference([{"image": image}], do_postprocess=False)[0]
    torch.testing.assert_close(boxes, fields.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
    assert "pred_boxes, scores, pred_classes, image_size" in (tmp_path / "out/README.md").read_text()


def test_the_folder_names_the_classes_and_is_as_open_as_the_umask(tmp_path):
    """D52"""
    cfg = standard_cfg(DATASETS__TRAIN=("exported",))
    MetadataCatalog.get("exported").thing_classes = ["ant", "bee", "cat"]
    checkpoint(cfg, tmp_path / "w.pth")
    report = export_student(cfg, str(tmp_path / "w.pth"), str(tmp_path / "out"))
    MetadataCatalog.remove("exported")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "bee", "cat"]
    assert "classes.json" in report.files and "ant, bee, cat" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "like").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "like").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "out").iterdir()} == {(tmp_path / "w.pth").stat().st_mode}


def test_half(tmp_path):
    cfg = standard_cfg()
    checkpoint(cfg, tmp_path / "w.pth")
    whole = export_student(cfg, str(tmp_path / "w.pth"), str(tmp_path / "whole"))
    half = export_student(cfg, str(tmp_path / "w.pth"), str(tmp_path / "half"), half=True)
    assert whole.feature_error == 0 < half.feature_error < 0.02
    sizes = [(tmp_path / name / "model.pth").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.51 * sizes[0]
    # Plain Detectron2 loads float16 weights into its float32 model.
    plain = get_cfg()
    plain.merge_from_file(str(tmp_path / "half/config.yaml"))
    model = build_model(plain)
    DetectionCheckpointer(model).load(str(tmp_path / "half/model.pth"))
    weight = model.backbone.bottom_up.res3[0].conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, torch.load(tmp_path / "w.pth")["model"]["backbone.bottom_up.res3.0.conv1.weight"].half())


def test_values_that_float16_cannot_hold_stay(tmp_path):
    cfg = standard_cfg()
    model = build_model(cfg)
    model.backbone.bottom_up.stem.conv1.norm.running_var.fill_(1e6)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    export_student(cfg, str(tmp_path / "w.pth"), str(tmp_path / "half"), half=True)
    state = torch.load(tmp_path / "half/model.pth")["model"]
    assert state["backbone.bottom_up.stem.conv1.norm.running_var"].eq(1e6).all()
    assert state["backbone.bottom_up.stem.conv1.norm.weight"].dtype == torch.float16


def test_a_timm_student_brings_its_backbone(tmp_path):
    cfg = tiny_cfg(
        MODEL__BACKBONE__NAME="build_timm_fpn_backbone",
        MODEL__TIMM__NAME="mobilenetv2_035",
        MODEL__TIMM__WEIGHTS="/only/at/training.pth",
        MODEL__FPN__IN_FEATURES=LEVELS,
        INPUT__MIN_SIZE_TEST=64,
    )
    checkpointed = cfg.clone()
    checkpointed.MODEL.TIMM.WEIGHTS = ""
    checkpoint(checkpointed, tmp_path / "w.pth")
    report = export_student(cfg, str(tmp_path / "w.pth"), str(tmp_path / "out"))
    assert "timm_backbone.py" in report.files and report.needs == ("timm",)
    count, _ = run_alone(tmp_path / "out")
    assert count > 0


def test_a_narrow_resnet_student_brings_its_backbone(tmp_path):
    cfg = standard_cfg(
        MODEL__BACKBONE__NAME="build_basic_resnet_fpn_backbone",
        MODEL__RESNETS__STEM_OUT_CHANNELS=8,
        MODEL__RESNETS__RES2_OUT_CHANNELS=8,
    )
    checkpoint(cfg, tmp_path / "w.pth")
    report = export_student(cfg, str(tmp_path / "w.pth"), str(tmp_path / "out"))
    assert "basic_resnet.py" in report.files and report.needs == ()
    count, _ = run_alone(tmp_path / "out")
    assert count > 0


@pytest.mark.parametrize(
    "problem,message",
    [
        ("missing", "The weights of the student do not exist|does not exist"),
        ("other", "do not fit the student"),
        ("full", "is not empty"),
        ("file", "out' is not a folder to export to"),
        ("classifier", "kd_det's own meta-architecture"),
    ],
)
def test_errors_leave_nothing_behind(tmp_path, problem, message):
    cfg, path, folder = tiny_cfg(), tmp_path / "w.pth", tmp_path / "out"
    if problem == "classifier":
        cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    elif problem != "missing":
        checkpoint(tiny_cfg(width=8) if problem == "other" else cfg, path)
    if problem == "file":
        folder.write_text("")
    if problem == "full":
        folder.mkdir()
        (folder / "mine.txt").write_text("")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export_student(cfg, str(path), str(folder))
    assert not (folder / "model.pth").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".export")]


def test_a_failed_check_run_is_an_error(tmp_path, monkeypatch):
    cfg = tiny_cfg()
    checkpoint(cfg, tmp_path / "w.pth")
    monkeypatch.setattr(
        kd_det.weights.export, "_weights", lambda model, half: {k: v * 1.01 for k, v in model.state_dict().items()}
    )
    with pytest.raises(ValueError, match="differs from the trained one"):
        export_student(cfg, str(tmp_path / "w.pth"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_tool(tmp_path):
    cfg = standard_cfg(MODEL__META_ARCHITECTURE="Distiller", KD__LOSSES=("NSTLoss",))
    checkpoint(cfg, tmp_path / "w.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    tool = Path(__file__).parents[2] / "tools/export_student.py"
    command = [sys.executable, "-W", "ignore", tool, "--config-file", "config.yaml", "--weights", "w.pth"]
    outcomes = []
    for options in (["--output", "out", "--half"], ["--output", "out"]):
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        outcomes.append((done.returncode, done.stdout, done.stderr))
    (status, out, _), (status_again, _, error) = outcomes
    assert status == 0 and out.startswith("out: config.yaml, model.pth, README.md; ") and "not kd_det" in out
    assert status_again == 1 and error.splitlines()[-1].startswith("error: The folder 'out' is not empty")
