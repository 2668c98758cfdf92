"""What the config does to an image, the data sets of a run, and whether what was trained can be evaluated on them."""

import os

from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from PIL import Image

from kd_det.cli.checks.run import PlannedRun, naming
from kd_det.data import check_dataset, check_voc_evaluation, evaluator_type
from kd_det.engine.trainer import EVALUATORS
from kd_det.errors import UserError, unknown_name
from kd_det.random_state import preserved_random_state

# What annotations must hold, by the option of the config that needs it.
_ANNOTATION_KEYS = {"MASK_ON": "segmentation", "KEYPOINT_ON": "keypoints"}
# Of COCO's evaluation besides boxes, by the attribute of the student's ROI heads that tells of their head.
_TASKS = {"segm": "mask_on", "keypoints": "keypoint_on"}


def check_input(run: PlannedRun) -> None:
    """Runs what the config does to an image, on a blank one."""
    cfg = run.cfg
    with naming(f"an image in INPUT.FORMAT {cfg.INPUT.FORMAT!r}", ValueError):
        image = convert_PIL_to_numpy(Image.new("RGB", (64, 48)), cfg.INPUT.FORMAT)
    with preserved_random_state(), naming("the input (INPUT.*)", ValueError):
        for augmentation in DatasetMapper.from_config(cfg, run.trains)["augmentations"]:
            augmentation(T.AugInput(image.astype("uint8")))
    if run.trains:
        with preserved_random_state(), naming("the train loader (DATALOADER.*)", ValueError):
            build_detection_train_loader(cfg, mapper=lambda x: x, dataset=[{"annotations": []}])


def check_datasets(run: PlannedRun) -> None:
    """Read the data sets, each once."""
    needs = {key: f"MODEL.{option}" for option, key in _ANNOTATION_KEYS.items() if run.cfg.MODEL[option]}
    for name in dict.fromkeys(run.training_sets + run.test_sets):
        read_whole = name in run.training_sets or evaluator_type(name) == "coco"
        summary = check_dataset(name, needs if read_whole else {}, evaluated=name in run.test_sets)
        run.datasets[name] = summary
        if summary.odd_boxes:
            run.warnings.append(
                f"data set '{name}': {summary.odd_boxes} of {summary.num_annotations} boxes reach beyond their image "
                f"or are empty, the first is {summary.first_odd_box}"
            )


def check_boxes_to_train_on(run: PlannedRun) -> None:
    """
    The training sets together must hold a box to learn from. One of them may be background alone, where
    DATALOADER.FILTER_EMPTY_ANNOTATIONS keeps images without boxes.
    """
    found = [run.datasets[name] for name in run.training_sets]
    if found and not any(summary.num_instances for summary in found):
        crowds = sum(summary.num_annotations for summary in found)
        raise UserError(
            f"DATASETS.TRAIN {tuple(run.training_sets)} has {sum(summary.num_images for summary in found)} images and "
            f"no annotation to train on"
            + (f": all {crowds} are crowds (iscrowd 1)" if crowds else " (images without: KD.UNLABELLED.DATASETS)")
        )
    for name, summary in zip(run.training_sets, found):
        if not summary.num_instances and run.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            run.warnings.append(
                f"data set '{name}' has no annotation to train on, and its images are left out "
                f"(DATALOADER.FILTER_EMPTY_ANNOTATIONS True)"
            )


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


def check_best_metric(run: PlannedRun) -> None:
    """``KD.BEST_METRIC`` is a number that evaluation will give, as far as the evaluators are known ones."""
    if not run.trains or not run.cfg.KD.BEST_METRIC:
        return
    metric = run.cfg.KD.BEST_METRIC
    if run.cfg.TEST.EVAL_PERIOD <= 0 or not run.test_sets:
        run.warnings.append(
            "KD.BEST_METRIC keeps model_best.pth by evaluations during training, and there are none (TEST.EVAL_PERIOD "
            f"{run.cfg.TEST.EVAL_PERIOD}, DATASETS.TEST {tuple(run.test_sets)})"
        )
        return
    known: list[str] = []
    for name in run.test_sets:
        numbers = _numbers(run, name)
        if not numbers:
            return
        known += [f"{name}/{number}" if len(run.test_sets) > 1 else number for number in numbers]
    if metric not in known:
        raise UserError(unknown_name("KD.BEST_METRIC", metric, known, most=24))


def _numbers(run: PlannedRun, name: str) -> list[str]:
    """What evaluation on a data set gives, such as "bbox/AP"; empty where that is not known."""
    kind, student = evaluator_type(name), run.student
    if kind == "classification" and getattr(student, "needs_labels", True):
        return ["classification/top1", "classification/top5"]
    if not isinstance(student, (GeneralizedRCNN, DenseDetector)):
        return []
    classes = run.datasets[name].thing_classes
    if kind == "pascal_voc":
        return ["bbox/AP", "bbox/AP50", "bbox/AP75"]
    if kind != "coco":
        return []
    heads = getattr(student, "roi_heads", None)
    tasks = ["bbox", *(task for task, head in _TASKS.items() if getattr(heads, head, False))]
    areas = ("AP", "AP50", "AP75", "APs", "APm", "APl", *(f"AP-{name}" for name in classes if len(classes) > 1))
    return [f"{task}/{area}" for task in tasks for area in areas if (task, area) != ("keypoints", "APs")]


def check_keypoints(run: PlannedRun) -> None:
    """The network's keypoints are the data's, and COCO's evaluation, which knows 17 sigmas, has one for each."""
    if not run.cfg.MODEL.KEYPOINT_ON:
        return
    configured, sigmas = run.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, run.cfg.TEST.KEYPOINT_OKS_SIGMAS
    for name, summary in run.datasets.items():
        if others := summary.num_keypoints - {configured}:
            key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
            raise UserError(f"data set '{name}' has {min(others)} keypoints an object and {key} is {configured}")
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
