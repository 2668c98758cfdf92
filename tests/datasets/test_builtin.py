"""Detectron2's builtin COCO and VOC names, loaders and evaluators on miniature data sets in their layouts."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.evaluation import PascalVOCDetectionEvaluator, inference_on_dataset, pascal_voc_evaluation
from detectron2.structures import BitMasks, Boxes, Instances, polygons_to_bitmask
from torch import nn

from kd_det.engine import Trainer
from kd_det.engine.evaluation import COCOEvaluator
from kd_det.engine.teacher_evaluation import register_first_images
from tests.datasets.miniature import IMAGES, write_coco, write_voc, write_voc_annotation
from tests.tiny import distillation_cfg, tiny_cfg


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The working folder holds ``datasets/``, which the builtin names mean where DETECTRON2_DATASETS is not set."""
    if not MetadataCatalog.get("coco_2017_val").json_file.startswith("datasets/"):
        pytest.skip("DETECTRON2_DATASETS was set when Detectron2 was imported")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    pascal_voc_evaluation.parse_rec.cache_clear()  # it remembers files by their path, here a relative one
    return tmp_path / "datasets"


class Oracle(nn.Module):
    """Says the annotations of a data set, with the scores of a list, moved by some pixels to the right."""

    def __init__(self, name: str, *, shift: float = 0.0, with_masks: bool = False):
        super().__init__()
        self.known = {record["image_id"]: record for record in DatasetCatalog.get(name)}
        self.shift, self.with_masks = shift, with_masks

    def forward(self, batched_inputs):
        outputs = []
        for x in batched_inputs:
            record = self.known[x["image_id"]]
            result = Instances((record["height"], record["width"]))
            boxes = np.array([a["bbox"] for a in record["annotations"]], dtype=np.float32).reshape(-1, 4)
            if record["annotations"] and record["annotations"][0]["bbox_mode"] == 1:  # XYWH
                boxes[:, 2:] += boxes[:, :2]
            boxes[:, [0, 2]] += self.shift
            result.pred_boxes = Boxes(torch.from_numpy(boxes))
            result.scores = torch.linspace(0.9, 0.5, len(boxes))
            result.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
            if self.with_masks:
                size = (record["height"], record["width"])
                polygons = [[np.array(p) for p in a["segmentation"]] for a in record["annotations"]]
                masks = np.stack([polygons_to_bitmask(p, *size) for p in polygons])
                result.pred_masks = BitMasks(torch.from_numpy(masks)).tensor
            outputs.append({"instances": result})
        return outputs


def loader(name):
    cfg = tiny_cfg(DATALOADER__NUM_WORKERS=0)
    return build_detection_test_loader(cfg, name)


def test_the_layouts_are_read(datasets):
    write_coco(datasets)
    write_voc(datasets)
    for name in ("coco_2017_train", "coco_2017_val", "voc_2007_trainval", "voc_2007_test", "voc_2012_trainval"):
        records = DatasetCatalog.get(name)
        names = MetadataCatalog.get(name).thing_classes
        found = []
        for record in records:
            boxes = [a["bbox"] for a in record["annotations"]]
            if name.startswith("coco"):
                boxes = [[x, y, x + w, y + h] for x, y, w, h in boxes]
            labels = [names[a["category_id"]] for a in record["annotations"]]
            found.append(((record["width"], record["height"]), [(n, *b) for n, b in zip(labels, boxes)]))
        assert found == IMAGES
    people = DatasetCatalog.get("keypoints_coco_2017_train")
    assert [len(r["annotations"]) for r in people] == [1, 0, 0, 1]
    assert people[0]["annotations"][0]["keypoints"][:3] == [9 + 0.5, 9 + 0.5, 2]


@pytest.mark.parametrize("evaluator_class", [COCOEvaluator, Detectron2COCOEvaluator])
def test_coco_through_the_builtin_loader_and_evaluator(datasets, tmp_path, evaluator_class):
    write_coco(datasets)
    found = {}
    for shift in (0, 4):
        evaluator = evaluator_class("coco_2017_val", output_dir=str(tmp_path / "inference"), tasks=("bbox",))
        model = Oracle("coco_2017_val", shift=shift)
        found[shift] = inference_on_dataset(model, loader("coco_2017_val"), evaluator)["bbox"]
    assert found[0]["AP"] == found[0]["AP50"] == found[0]["AP-dog"] == pytest.approx(100)
    # A box w wide, moved by 4 pixels, has IoU (w - 4) / (w + 4) with where it was: the two people, 32 and 36 wide,
    # 0.778 and 0.8. Of COCO's ten thresholds both are found at six (0.5 to 0.75). At 0.8 only the second is, and the
    # miss is ranked before it (equal scores keep the order of images): precision 1/2 up to recall 1/2, 51 of the 101
    # points.
    assert found[4]["AP-person"] == pytest.approx(60 + 10 * 0.5 * 51 / 101)
    assert found[4]["AP50"] == pytest.approx(100)


def test_masks_of_coco(datasets, tmp_path):
    write_coco(datasets)
    evaluator = COCOEvaluator("coco_2017_val", output_dir=str(tmp_path), tasks=("bbox", "segm"))
    oracle = Oracle("coco_2017_val", with_masks=True)
    results = inference_on_dataset(oracle, loader("coco_2017_val"), evaluator)
    assert results["segm"]["AP"] == pytest.approx(100) and results["bbox"]["AP"] == pytest.approx(100)


def test_voc_through_the_builtin_loader_and_evaluator(datasets):
    write_voc(datasets)
    model, evaluator = Oracle("voc_2007_test"), PascalVOCDetectionEvaluator("voc_2007_test")
    results = inference_on_dataset(model, loader("voc_2007_test"), evaluator)["bbox"]
    # Three of VOC's twenty classes occur, all found; a class that does not occur counts 0.
    assert results == pytest.approx({"AP": 15.0, "AP50": 15.0, "AP75": 15.0})


@pytest.mark.parametrize("name, write", [("coco_2017_val", write_coco), ("voc_2007_test", write_voc)])
def test_the_first_images_of_a_data_set(datasets, tmp_path, name, write):
    """What lies behind them is no miss; VOC's are evaluated by COCO's measures."""
    write(datasets)
    first = register_first_images(name, 2)
    cfg = tiny_cfg(OUTPUT_DIR=str(tmp_path / "out"), DATALOADER__NUM_WORKERS=0)
    results = inference_on_dataset(Oracle(name), loader(first), Trainer.build_evaluator(cfg, first))
    assert results["bbox"]["AP"] == pytest.approx(100) and len(DatasetCatalog.get(first)) == 2
    DatasetCatalog.remove(first)
    MetadataCatalog.remove(first)


def test_average_precision_of_voc_by_hand(datasets):
    write_voc(datasets)
    annotations = datasets / "VOC2007" / "Annotations"
    for i, (size, _) in enumerate(IMAGES):
        write_voc_annotation(annotations / f"{1000 + i:06d}.xml", size, [])
    dogs = [("dog", 10, 10, 60, 60, 0), ("dog", 70, 10, 90, 30, 1)]
    write_voc_annotation(annotations / "001000.xml", (128, 96), dogs)
    write_voc_annotation(annotations / "001001.xml", (96, 128), [("dog", 20, 20, 80, 100, 0)])
    evaluator = PascalVOCDetectionEvaluator("voc_2007_test")
    dog = MetadataCatalog.get("voc_2007_test").thing_classes.index("dog")
    found = {
        # A hit; the difficult dog, which counts neither way; a second hit on the first dog, which is a false one.
        "001000": [((10, 10, 60, 60), 0.9), ((70, 10, 90, 30), 0.85), ((11, 10, 60, 60), 0.8)],
        # A hit.
        "001001": [((20, 20, 80, 92), 0.7)],
        "001002": [((0, 0, 20, 20), 0.6)],
    }
    evaluator.reset()
    for image_id, boxes in found.items():
        instances = Instances((128, 128))
        instances.pred_boxes = Boxes(torch.tensor([box for box, _ in boxes], dtype=torch.float32))
        instances.scores = torch.tensor([score for _, score in boxes])
        instances.pred_classes = torch.full((len(boxes),), dog)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    results = evaluator.evaluate()["bbox"]
    # Two dogs count. Ranked: hit (precision 1, recall 1/2), miss, hit (2/3, 1), miss. VOC 2007 takes the best precision
    # at recall 0, 0.1, ..., 1: six times 1 (up to 0.5) and five times 2/3. Twenty classes.
    ap = 100 * (6 * 1 + 5 * 2 / 3) / 11 / 20
    assert results["AP50"] == results["AP75"] == pytest.approx(ap)
    # The last hit's IoU is 72 / 80 = 0.9, and VOC wants more than the threshold: it holds at eight of ten, up to 0.85.
    # At 0.9 and 0.95 recall ends at 1/2: six times 1.
    assert results["AP"] == pytest.approx((8 * ap + 2 * 100 * 6 / 11 / 20) / 10)


@pytest.mark.parametrize("data", ["coco", "voc"])
def test_training_and_evaluation(datasets, tmp_path, data):
    if data == "coco":
        write_coco(datasets)
        train, test, classes = ("coco_2017_train",), ("coco_2017_val",), 80
    else:
        write_voc(datasets)
        train, test, classes = ("voc_2007_trainval", "voc_2012_trainval"), ("voc_2007_test",), 20
    teacher = tiny_cfg(depth=50, width=8, MODEL__ROI_HEADS__NUM_CLASSES=classes)
    cfg = distillation_cfg(tmp_path, "NSTLoss", "SoftTargetLoss", teacher=teacher)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 2, 2
    cfg.TEST.EVAL_PERIOD = 2
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    trainer.train()
    results = trainer._last_eval_results["bbox"]
    assert {"AP", "AP50", "AP75"} <= set(results)
    assert 0 <= results["AP50"] <= 100
    latest = trainer.storage.latest()
    assert all(np.isfinite(latest[key][0]) for key in ("loss_nst", "loss_soft_target", "loss_rpn_cls"))
