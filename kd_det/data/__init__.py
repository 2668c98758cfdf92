"""Checks of any registered data set, and the names of its classes."""

from kd_det.data.checks import CheckedMapper, DatasetError, DatasetSummary, check_dataset, evaluator_type
from kd_det.data.classes import class_names
from kd_det.data.voc import check_voc_evaluation

__all__ = [
    "CheckedMapper",
    "DatasetError",
    "DatasetSummary",
    "check_dataset",
    "check_voc_evaluation",
    "class_names",
    "evaluator_type",
]
