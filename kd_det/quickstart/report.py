"""What the quickstart shows of its runs: that plain Detectron2 detects the same."""

import os

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from kd_det.backbones import basic_resnet
from kd_det.errors import UserError
from kd_det.student import student_cfg
from kd_det.study.picture import predictor
from kd_det.study.runs import Run, run_command

__all__ = ["check_plain", "num_parameters"]

COMPARED_IMAGES = 50


def num_parameters(cfg: CfgNode) -> int:
    """The number of parameters that are deployed: without teacher and connectors."""
    return sum(parameter.numel() for parameter in build_model(student_cfg(cfg)).parameters())


def check_plain(output: str, dataset: str, run: Run) -> str:
    """
    Load a checkpoint where kd_det is not imported, and compare detections with the Distiller's: ``UserError`` if it
    does not load strictly or they differ. The other process reads and writes files in ``output``.
    """
    config_file, images_file, found_file = (
        os.path.join(output, f"plain_{name}") for name in ("student.yaml", "images.txt", "detections.pth")
    )
    images = [r["file_name"] for r in DatasetCatalog.get(dataset)[:COMPARED_IMAGES]]
    for path, text in ((config_file, student_cfg(run.cfg).dump()), (images_file, "\n".join(images) + "\n")):
        with open(path, "w") as f:
            f.write(text)
    script = os.path.relpath(os.path.join(os.path.dirname(__file__), "plain_detections.py"))
    files = ["--config-file", config_file, "--weights", run.weights, "--images", images_file, "--output", found_file]
    run_command([script, *files, "--register", os.path.relpath(basic_resnet.__file__)])
    distiller, detections = predictor(run), 0
    for path, (boxes, scores, classes) in zip(images, torch.load(found_file)):
        instances = distiller(cv2.imread(path))["instances"].to("cpu")
        detections += len(instances)
        same = len(boxes) == len(instances) and torch.equal(classes, instances.pred_classes)
        # Bit for bit on the CPU; a GPU may sum in another order.
        same = same and torch.allclose(boxes, instances.pred_boxes.tensor, atol=1e-2)
        if not (same and torch.allclose(scores, instances.scores, atol=1e-4)):
            raise UserError(f"plain Detectron2 and the Distiller disagree on {path}")
    return f"without kd_det  loads strictly, and gives the same {detections} detections on {len(images)} val images"
