"""Names that stood here before every detector's training could keep an average."""

from kd_det.engine.average import AverageStatistics
from kd_det.weights.average import WeightAverage

__all__ = ["AverageStatistics", "WeightAverage"]
