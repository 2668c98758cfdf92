"""The offline data set, its registration in Detectron2's catalogs, and checks for any registered data set."""

from kd_det.data.checks import CheckedMapper, DatasetError, DatasetSummary, check_dataset, check_voc_evaluation
from kd_det.data.register import register_digits

__all__ = [
    "CheckedMapper",
    "DatasetError",
    "DatasetSummary",
    "check_dataset",
    "check_voc_evaluation",
    "register_digits",
]
