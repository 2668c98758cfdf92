"""Whether what was trained can be evaluated: said before training, not after."""

import os

from detectron2.modeling import GeneralizedRCNN

from kd_det.cli.checks.planned_run import PlannedRun
from kd_det.data import check_voc_evaluation, evaluator_type
from kd_det.engine.trainer import EVALUATORS
from kd_det.errors import UserError, unknown_name

__all__ = [
    "check_evaluators",
    "check_keypoints",
    "check_test_time_augmentation",
    "check_there_is_something_to_evaluate",
]


def check_there_is_something_to_evaluate(run: PlannedRun) -> None:
    if run.trains:
        return
    if not run.test_sets:
        raise UserError("DATASETS.TEST is empty: there is nothing to evaluate on")
    resumes = run.args.resume and os.path.isfile(os.path.join(run.cfg.OUTPUT_DIR, "last_checkpoint"))
    if not run.cfg.MODEL.WEIGHTS and not resumes:
        raise UserError("MODEL.WEIGHTS is empty: there is nothing to evaluate")


def check_evaluators(run: PlannedRun) -> None:
    for name in run.test_sets:
        kind = evaluator_type(name)
        if kind not in EVALUATORS:
            raise UserError(f"data set '{name}': {unknown_name('evaluator_type', kind, EVALUATORS)}")
        if kind == "pascal_voc":
            check_voc_evaluation(name)
        if kind == "coco" and not run.datasets[name].thing_classes:
            raise UserError(f"data set '{name}' cannot be evaluated: its metadata lacks thing_classes, the class names")


def check_keypoints(run: PlannedRun) -> None:
    """The network's keypoints are the data's, and COCO's evaluation, which knows 17 sigmas, has one for each."""
    if not run.cfg.MODEL.KEYPOINT_ON:
        return
    configured, sigmas = run.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, run.cfg.TEST.KEYPOINT_OKS_SIGMAS
    for name, summary in run.datasets.items():
        for found in summary.num_keypoints:
            if found != configured:
                raise UserError(
                    f"data set '{name}' has {found} keypoints an object and MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is "
                    f"{configured}"
                )
    if any(evaluator_type(name) == "coco" for name in run.test_sets) and len(sigmas or range(17)) != configured:
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} numbers, and evaluation needs one for each of the "
            f"{configured} keypoints" + ("" if sigmas else " (COCO's own are for its 17)")
        )


def check_test_time_augmentation(run: PlannedRun) -> None:
    if run.cfg.TEST.AUG.ENABLED and not isinstance(run.student, GeneralizedRCNN):
        raise UserError(
            f"TEST.AUG.ENABLED: Detectron2 has test-time augmentation for GeneralizedRCNN, the student is "
            f"{type(run.student).__name__}"
        )
