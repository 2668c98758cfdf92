"""What the config does to an image, and the data sets of a detector's run."""

from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import Image

from kd_det.cli.checks.building import naming
from kd_det.cli.checks.planned_run import PlannedRun
from kd_det.data import check_dataset, evaluator_type
from kd_det.errors import UserError
from kd_det.random_state import preserved_random_state

__all__ = ["check_boxes_to_train_on", "check_datasets", "check_input"]

# What annotations must hold, by the option of the config that needs it.
_ANNOTATION_KEYS = {"MASK_ON": "segmentation", "KEYPOINT_ON": "keypoints"}


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
            f"no annotation to train on" + (f": all {crowds} are crowds (iscrowd 1)" if crowds else "")
        )
    for name, summary in zip(run.training_sets, found):
        if not summary.num_instances and run.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            run.warnings.append(
                f"data set '{name}' has no annotation to train on, and its images are left out "
                f"(DATALOADER.FILTER_EMPTY_ANNOTATIONS True)"
            )
