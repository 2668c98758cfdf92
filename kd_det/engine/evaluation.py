"""COCO evaluation in compiled code, also where Detectron2's own compiled evaluator was not built."""

import contextlib
import io
import logging
import os

from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.evaluation import coco_evaluation
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["COCOEvaluator", "fast_coco_eval", "test_with_augmentation"]

logger = logging.getLogger(__name__)


class COCOEvaluator(Detectron2COCOEvaluator):
    """
    Detectron2's, with the same arguments and results. Where Detectron2 falls back to pycocotools' Python loops, the
    package faster-coco-eval does the same sums in C++ if it is installed.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _complete_annotations(self._coco_api)

    def _eval_predictions(self, *args, **kwargs):
        # Both versions of Detectron2 look this name up when they evaluate, and bind it to COCOeval without their
        # extension. faster-coco-eval takes whole numbers for the images' ids only.
        original = coco_evaluation.COCOeval_opt
        if original is COCOeval:
            if _is_installed() and all(isinstance(image_id, int) for image_id in self._coco_api.imgs):
                coco_evaluation.COCOeval_opt = fast_coco_eval
                logger.info("Evaluating with faster-coco-eval.")
            else:
                logger.info("Evaluating with pycocotools' Python loops; faster-coco-eval is faster.")
        try:
            return super()._eval_predictions(*args, **kwargs)
        finally:
            coco_evaluation.COCOeval_opt = original


def fast_coco_eval(coco_gt: COCO, coco_dt: COCO, iou_type: str):
    """pycocotools' ``COCOeval(coco_gt, coco_dt, iou_type)`` by faster-coco-eval: the same interface and numbers."""
    from faster_coco_eval import COCO as FastCOCO
    from faster_coco_eval import COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        return COCOeval_faster(FastCOCO(coco_gt.dataset), FastCOCO(coco_dt.dataset), iou_type, print_function=print)


def test_with_augmentation(cfg: CfgNode, model: GeneralizedRCNN, trainer_class) -> dict:
    """
    Evaluate a detector with Detectron2's test-time augmentation, as its own tool does for ``TEST.AUG.ENABLED``.

    Returns:
        Results as ``trainer_class.test`` gives them, the tasks with the ending "_TTA".
    """
    logger.info("Evaluating with test-time augmentation (TEST.AUG.ENABLED).")
    folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
    evaluators = [trainer_class.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
    results = trainer_class.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
    return {f"{task}_TTA": values for task, values in results.items()}


def _complete_annotations(coco_api: COCO) -> None:
    """Fill in what many annotation tools leave out and evaluation needs: crowd, area, numbers above 0 as ids."""
    annotations = coco_api.dataset.get("annotations", [])
    for annotation in annotations:
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            has_mask = bool(annotation.get("segmentation"))
            width, height = annotation["bbox"][2:]
            annotation["area"] = float(mask.area(coco_api.annToRLE(annotation))) if has_mask else width * height
    # Evaluators mark a box that nothing was matched with by the id 0. No result depends on other ids.
    if not all(isinstance(annotation["id"], int) and annotation["id"] > 0 for annotation in annotations):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
        coco_api.createIndex()


def _is_installed() -> bool:
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        return False
    return True
