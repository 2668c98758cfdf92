"""Images without annotations, and the results that label them."""

from kd_det.cli.checks.run import PlannedRun
from kd_det.data import check_dataset
from kd_det.engine.unlabelled import has_unlabelled, unlabelled_batch_size, unlabelled_dataset, unlabelled_names
from kd_det.errors import UserError


def check_unlabelled(run: PlannedRun) -> None:
    """``KD.UNLABELLED``: its images can be read, and its results are of these images and of the student's classes."""
    node = run.cfg.get("KD", {}).get("UNLABELLED")
    if node is None or not run.trains:
        return
    if not 0 <= node.RATIO < float("inf"):
        raise UserError(f"KD.UNLABELLED.RATIO must be a finite number >= 0, found {node.RATIO}")
    if not has_unlabelled(run.cfg):
        if node.RATIO:
            raise UserError(
                "KD.UNLABELLED.RATIO is above 0, and a plain student does not use unlabelled images: set "
                "MODEL.META_ARCHITECTURE 'Distiller', also where no network teaches (KD.UNLABELLED.RESULTS)"
            )
        if node.DATASETS:
            run.warnings.append("KD.UNLABELLED.RATIO is 0.0: the unlabelled images are not used")
        return
    if not node.WEIGHT and not run.model.losses:
        raise UserError("KD.UNLABELLED.WEIGHT is 0.0 and nothing is distilled: unlabelled images would teach nothing")
    unlabelled_batch_size(run.cfg, run.cfg.SOLVER.IMS_PER_BATCH // run.num_processes)
    for name in unlabelled_names(run.cfg):
        summary = check_dataset(name)
        if summary.num_annotations:
            run.warnings.append(
                f"unlabelled data set '{name}' has {summary.num_annotations} annotations, which are not used: to learn "
                f"from them, name it in DATASETS.TRAIN"
            )
    unlabelled_dataset(run.cfg)
