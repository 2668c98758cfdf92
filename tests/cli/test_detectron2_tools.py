"""Detectron2's own tools on a Distiller, its config, and its checkpoint."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader, detection_utils
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count
from detectron2.utils.visualizer import Visualizer

from kd_det import student_cfg
from tests.datasets.miniature import write_coco
from tests.tiny import distillation_cfg


@pytest.fixture
def trained(tmp_path):
    """A distillation config whose MODEL.WEIGHTS is a checkpoint of its Distiller, and the plain student."""
    cfg = distillation_cfg(tmp_path, "NSTLoss", "SoftTargetLoss", INPUT__MIN_SIZE_TEST=64, INPUT__MAX_SIZE_TEST=128)
    torch.manual_seed(2)
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    cfg.DATASETS.TEST = ()
    return cfg, model.student.eval()


def picture(height=64, width=96):
    return np.random.RandomState(0).randint(256, size=(height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("plain", [False, True])
def test_default_predictor(trained, plain):
    cfg, student = trained
    predictor = DefaultPredictor(student_cfg(cfg) if plain else cfg)
    image = picture()
    got = predictor(image)["instances"]
    tensor = torch.from_numpy(image.transpose(2, 0, 1).astype("float32"))
    with torch.no_grad():
        want = student([{"image": tensor, "height": 64, "width": 96}])[0]["instances"]
    assert len(want) > 0 and torch.equal(got.pred_boxes.tensor, want.pred_boxes.tensor)
    assert torch.equal(got.scores, want.scores)


def test_test_time_augmentation_of_the_student(trained):
    cfg, _ = trained
    cfg.TEST.AUG.MIN_SIZES = (48, 64)
    model = GeneralizedRCNNWithTTA(cfg, build_model(cfg).student).eval()
    image = torch.from_numpy(picture().transpose(2, 0, 1).copy())
    with torch.no_grad():
        instances = model([{"image": image, "height": 64, "width": 96}])[0]["instances"]
    assert len(instances) > 0 and instances.image_size == (64, 96)


def test_flops_and_parameters_are_the_students(trained):
    cfg, student = trained
    distiller = build_model(cfg).eval()
    inputs = [{"image": torch.from_numpy(picture().transpose(2, 0, 1).astype("float32"))}]
    counts = []
    for model in (distiller, student):
        analysis = FlopCountAnalysis(model, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts.append(analysis.total())
    assert counts[0] == counts[1] > 1e5
    assert parameter_count(distiller)[""] == sum(p.numel() for p in student.parameters())


def test_visualize_json_results(trained, tmp_path, monkeypatch):
    """What Detectron2's tools/visualize_json_results.py does with the file that evaluation writes."""
    cfg, _ = trained
    write_coco(tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    model = DefaultPredictor(cfg).model
    loader = build_detection_test_loader(cfg, "coco_2017_val", num_workers=0)
    inference_on_dataset(model, loader, COCOEvaluator("coco_2017_val", tasks=("bbox",), output_dir="inference"))
    predictions = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    metadata = MetadataCatalog.get("coco_2017_val")
    record = DatasetCatalog.get("coco_2017_val")[0]
    image = detection_utils.read_image(record["file_name"], "RGB")
    mine = [p for p in predictions if p["image_id"] == record["image_id"]]
    instances = Instances(image.shape[:2])
    boxes = np.array([p["bbox"] for p in mine]).reshape(-1, 4)
    instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    instances.scores = np.array([p["score"] for p in mine])
    ids = metadata.thing_dataset_id_to_contiguous_id
    instances.pred_classes = np.array([ids[p["category_id"]] for p in mine])
    assert len(instances) > 0 and set(instances.pred_classes) <= {0, 1, 2}
    drawn = Visualizer(image, metadata).draw_instance_predictions(instances).get_image()
    assert drawn.shape == image.shape and (drawn != image).any()
