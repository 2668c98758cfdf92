"""Checks of any registered data set."""

from kd_det.data.checks import CheckedMapper, DatasetError, DatasetSummary, check_dataset, evaluator_type
from kd_det.data.voc import check_voc_evaluation

__all__ = ["CheckedMapper", "DatasetError", "DatasetSummary", "check_dataset", "check_voc_evaluation", "evaluator_type"]
