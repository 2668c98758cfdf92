"""What several runs detect on the same images, in one picture."""

from collections.abc import Sequence

import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor

from kd_det.study.runs import Run
from kd_det.visualization import detection_grid, draw_detections, draw_ground_truth

__all__ = ["draw_runs", "predictor"]

PICTURED_IMAGES = 6


def draw_runs(path: str, dataset: str, runs: Sequence[Run]) -> None:
    """Ground truth and detections of finished runs on the first images of a data set, as a PNG."""
    metadata = MetadataCatalog.get(dataset)
    predictors = [predictor(run) for run in runs]
    rows = []
    for record in DatasetCatalog.get(dataset)[:PICTURED_IMAGES]:
        image = cv2.imread(record["file_name"])
        found = [predict(image)["instances"] for predict in predictors]
        detections = [draw_detections(image, instances, metadata) for instances in found]
        rows.append([draw_ground_truth(image, record, metadata, like=found[0]), *detections])
    cv2.imwrite(path, detection_grid(["ground truth", *(run.name for run in runs)], rows))


def predictor(run: Run) -> DefaultPredictor:
    """Of a finished run, with its last weights."""
    cfg = run.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = run.weights
    return DefaultPredictor(cfg)
