"""Checks of any registered data set."""

from kd_det.data.checks import CheckedMapper, DatasetError, DatasetSummary, check_dataset, check_voc_evaluation

__all__ = ["CheckedMapper", "DatasetError", "DatasetSummary", "check_dataset", "check_voc_evaluation"]
