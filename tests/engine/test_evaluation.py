"""The compiled COCO evaluator says the same as pycocotools."""

import json
import logging
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import coco_evaluation
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.engine.evaluation import COCOEvaluator, fast_coco_eval


def random_coco(kind: str, *, images: int = 30, detections: int = 12):
    """Ground truth with crowds and tied scores, and detections of which half are near an object."""
    r = np.random.RandomState(0)
    num_classes = 1 if kind == "keypoints" else 5
    annotations, results = [], []
    for image_id in range(1, images + 1):
        here = []
        for _ in range(r.randint(7)):
            x, y, w, h = *r.uniform(0, 400, 2), *np.exp(r.uniform(2, 5.3, 2))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": r.randint(1, num_classes + 1),
                "bbox": [x, y, w, h],
                "area": 0.7 * w * h,
                "iscrowd": int(kind != "keypoints" and r.rand() < 0.1),
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                "keypoints": [v for _ in range(17) for v in (x + w * r.rand(), y + h * r.rand(), r.randint(3))],
            }
            annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
            here.append(annotation)
            annotations.append(annotation)
        for _ in range(detections):
            source = here[r.randint(len(here))] if here and r.rand() < 0.5 else None
            box = source["bbox"] if source else [*r.uniform(0, 400, 2), *np.exp(r.uniform(2, 5.3, 2))]
            box = [float(max(v + r.normal(0, 6), 1)) for v in box]
            label = source["category_id"] if source else r.randint(1, num_classes + 1)
            result = {"image_id": image_id, "category_id": label, "score": float(np.round(r.rand(), 1))}
            if kind == "bbox":
                result["bbox"] = box
            elif kind == "segm":
                x, y, w, h = box
                result["segmentation"] = mask_utils.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], 480, 640)[0]
            else:
                points = source["keypoints"] if source else r.uniform(0, 400, 51).tolist()
                result["keypoints"] = [v + r.normal(0, 5) for v in points]
            results.append(result)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": c, "name": str(c)} for c in range(1, num_classes + 1)],
        "info": {},
    }
    truth.createIndex()
    return truth, results


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_equal_numbers(kind):
    truth, results = random_coco(kind)
    detections = truth.loadRes(results)
    slow, fast = (evaluate(truth, detections, kind) for evaluate in (COCOeval, fast_coco_eval))
    for evaluator in (slow, fast):
        evaluator.params.imgIds = list(range(1, 29))  # as Detectron2 sets them
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    assert slow.eval["precision"].max() > 0.3 and slow.stats[0] > 0
    np.testing.assert_allclose(fast.eval["precision"], slow.eval["precision"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(fast.eval["recall"], slow.eval["recall"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(fast.stats[: len(slow.stats)], slow.stats, rtol=0, atol=1e-12)


def test_which_evaluator_is_used(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="kd_det.engine.evaluation")

    class Compiled(COCOeval):
        used = 0

        def evaluate(self):
            Compiled.used += 1
            super().evaluate()

    truth, results = random_coco("bbox")
    (tmp_path / "truth.json").write_text(json.dumps(truth.dataset, default=int))
    name = str(tmp_path)
    register_coco_instances(name, {}, str(tmp_path / "truth.json"), name)
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {c: c - 1 for c in range(1, 6)}

    def evaluate():
        evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False, output_dir=name)
        evaluator._predictions = [
            {"instances": [{**r, "category_id": r["category_id"] - 1} for r in results if r["image_id"] == i]}
            for i in range(1, 31)
        ]
        return evaluator.evaluate()["bbox"]

    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", COCOeval)  # as in a Detectron2 without its extension
    fast = evaluate()
    assert coco_evaluation.COCOeval_opt is COCOeval  # nothing stays replaced
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "faster_coco_eval", None)  # as where it is not installed
        assert evaluate() == pytest.approx(fast, nan_ok=True)
    messages = [
        record.getMessage().partition(";")[0] for record in caplog.records if record.name == "kd_det.engine.evaluation"
    ]
    assert messages == ["Evaluating with faster-coco-eval.", "Evaluating with pycocotools' Python loops"]
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", Compiled)
    assert evaluate() == pytest.approx(fast, nan_ok=True)
    assert Compiled.used == 1 and coco_evaluation.COCOeval_opt is Compiled
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("first_id", [0, 1, -1, "a"])
def test_ids_of_annotations_do_not_matter(first_id, fast, tmp_path, monkeypatch):
    """One box, found exactly: an AP of 100. By the id 0, evaluators mean that nothing was matched."""
    name = f"ids_{first_id}_{fast}"
    box = {"category_id": 1, "bbox": [1.0, 2.0, 30.0, 40.0], "iscrowd": 0, "area": 1200.0}
    file = tmp_path / "truth.json"
    images, categories = [{"id": 1, "width": 64, "height": 64}], [{"id": 1, "name": "cat"}]
    annotations = [{"id": first_id, "image_id": 1, **box}]
    file.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    MetadataCatalog.get(name).set(json_file=str(file), thing_dataset_id_to_contiguous_id={1: 0}, thing_classes=["cat"])
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", COCOeval)
    if not fast:
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False, output_dir=str(tmp_path))
    evaluator._predictions = [{"instances": [{"image_id": 1, "category_id": 0, "bbox": box["bbox"], "score": 0.9}]}]
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    MetadataCatalog.remove(name)
