"""What a run looks like: pictures of detections side by side, and tables of results."""

from kd_det.visualization.comparison import detection_grid, draw_detections, draw_ground_truth
from kd_det.visualization.tables import comparison_table, seeds_table

__all__ = ["comparison_table", "detection_grid", "draw_detections", "draw_ground_truth", "seeds_table"]
