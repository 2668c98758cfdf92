"""``import kd_det`` registers meta-architectures and losses, and does nothing else."""

import runpy
import subprocess
import sys

import pytest
import torch
from torch.torch_version import TorchVersion

from kd_det import compat

CODE = """
import sys
sys.modules["cv2"] = None  # not installed
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
before = sorted(DatasetCatalog.list()), sorted(MetadataCatalog.list())
import kd_det
assert (sorted(DatasetCatalog.list()), sorted(MetadataCatalog.list())) == before, "it registers data sets"
assert {"Distiller", "ImageClassifier", "NetworkClassifier"} <= {name for name, _ in META_ARCH_REGISTRY}
assert kd_det.DISTILLATION_LOSS_REGISTRY.get("GradientAttentionLoss")
stage = ("data", "loader", "mapper", "trainer", "evaluator", "average")
loaded = [name for name in sys.modules if name.startswith(tuple(f"kd_det.classification.{part}" for part in stage))]
rooms = ("engine", "cli", "quickstart", "study", "visualization")
loaded += [name for name in sys.modules if name.startswith(tuple(f"kd_det.{room}" for room in rooms))]
loaded += [name for name in ("timm", "safetensors") if name in sys.modules]
assert not loaded, loaded
"""


def test_importing_needs_no_opencv_and_registers_no_data_set():
    """D36"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], check=True)


def test_an_old_pytorch_is_refused_in_one_line(monkeypatch):  # D35
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.2.2"))
    with pytest.raises(ImportError, match="kd_det needs PyTorch 2.6 or newer, found 2.2.2"):
        runpy.run_path(compat.__file__)
