"""
What is wrong with a run, found before anything is written and before any image is trained on.

A check is a function of a :class:`PlannedRun` that raises ``UserError`` with one line. To add one, write it in the
module of its subject and name it in the list below.
"""

import argparse
import os

from detectron2.config import CfgNode

from kd_det.classification.checks import check_data, check_input, check_needs_no_labels, check_whole_backbone_learns
from kd_det.classification.trainer import is_classifier
from kd_det.cli.checks import classes, data, model, unlabelled
from kd_det.cli.checks.run import PlannedRun, check_folder, check_processes, check_solver
from kd_det.cli.teacher import UNDECIDED
from kd_det.engine.stopping import restartable

__all__ = ["PlannedRun", "check_run"]

# In this order: the cheap ones first.
CHECKS = (
    lambda run: check_folder(run.cfg.OUTPUT_DIR, run.args),
    check_solver,
    check_processes,
    data.check_there_is_something_to_evaluate,
    lambda run: check_needs_no_labels(run.cfg) if run.trains and run.cfg.KD.LOSSES != UNDECIDED else None,
    model.check_model,
    model.check_norms,
    model.check_weights,
    data.check_test_time_augmentation,
)
DETECTOR_CHECKS = (
    data.check_input,
    data.check_datasets,
    data.check_boxes_to_train_on,
    unlabelled.check_unlabelled,
    classes.check_class_lists,
    classes.check_teacher_classes,
    data.check_evaluators,
    data.check_best_metric,
    data.check_keypoints,
    model.check_teacher_evaluation,
)
CLASSIFIER_CHECKS = (
    lambda run: check_input(run.cfg),
    lambda run: check_data(run.cfg, run.training_sets, run.test_sets),
    lambda run: check_whole_backbone_learns(run.cfg, run.model) if run.trains else None,
    data.check_best_metric,
    model.check_teacher_evaluation,
)


@restartable()
def check_run(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """
    Check everything that can be known before training. Under torchrun, only the first process of each machine checks.

    With ``--teacher`` and without ``--losses``, the losses and levels are chosen here, where both networks are built
    (once, on the CPU), and appended to ``args.opts`` for the processes that train. What deserves a warning is left in
    ``args.warnings``.

    Args:
        cfg: the config of the run.
        args: its command line, see :func:`kd_det.cli.argument_parser`.

    Returns:
        The config, complete.

    Raises:
        ValueError, OSError: with one line for the user.
    """
    args.warnings = []
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return cfg
    run = PlannedRun(cfg, args)
    for check in CHECKS:
        check(run)
    for check in CLASSIFIER_CHECKS if is_classifier(cfg) else DETECTOR_CHECKS:
        check(run)
    args.warnings = run.warnings
    return run.cfg
