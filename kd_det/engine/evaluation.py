"""COCO evaluation in compiled code, also where Detectron2's own compiled evaluator was not built."""

import contextlib
import io
import logging
from typing import Callable

from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.evaluation import coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["COCOEvaluator", "fast_coco_eval"]

logger = logging.getLogger(__name__)


class COCOEvaluator(Detectron2COCOEvaluator):
    """
    Detectron2's, with the same arguments and results. Where Detectron2 falls back to pycocotools' Python loops, the
    package faster-coco-eval does the same sums in C++ if it is installed.
    """

    def _eval_predictions(self, *args, **kwargs):
        with _fast_implementation():
            return super()._eval_predictions(*args, **kwargs)


def fast_coco_eval(coco_gt: COCO, coco_dt: COCO, iou_type: str):
    """
    pycocotools' ``COCOeval(coco_gt, coco_dt, iou_type)`` by faster-coco-eval: the same interface and numbers.

    Raises:
        ImportError: faster-coco-eval is not installed.
    """
    from faster_coco_eval import COCO as FastCOCO
    from faster_coco_eval import COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        return COCOeval_faster(FastCOCO(coco_gt.dataset), FastCOCO(coco_dt.dataset), iou_type, print_function=print)


def _is_installed() -> bool:
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def _fast_implementation():
    # Both versions of Detectron2 look this name up when they evaluate, and bind it to COCOeval without their extension.
    original: Callable = coco_evaluation.COCOeval_opt
    if original is COCOeval and _is_installed():
        coco_evaluation.COCOeval_opt = fast_coco_eval
        logger.info("Evaluating with faster-coco-eval.")
    elif original is COCOeval:
        logger.info("Evaluating with pycocotools' Python loops; faster-coco-eval, if installed, gives the same faster.")
    try:
        yield
    finally:
        coco_evaluation.COCOeval_opt = original
