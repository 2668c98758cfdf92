"""What a run looks like: detections, feature maps, curves, tables, and a page of them all."""

from kd_det.visualization.curves import draw_curves, plot_curves
from kd_det.visualization.detections import detection_grid, draw_detections, draw_ground_truth
from kd_det.visualization.history import History, read_history
from kd_det.visualization.hook import VisualizationHook
from kd_det.visualization.panels import Chart, Panel, Row, draw_row, overlay, stack
from kd_det.visualization.pictures import Viewer, attention_row, detections_row
from kd_det.visualization.report import ReportedRun, render_report
from kd_det.visualization.tables import TABLE_FORMATS, RunSummary, comparison_table, runs_table
from kd_det.visualization.view import Sample, Seen, View, read_sample

__all__ = [
    "TABLE_FORMATS",
    "Chart",
    "History",
    "Panel",
    "ReportedRun",
    "Row",
    "RunSummary",
    "Sample",
    "Seen",
    "View",
    "Viewer",
    "VisualizationHook",
    "attention_row",
    "comparison_table",
    "detection_grid",
    "detections_row",
    "draw_curves",
    "draw_detections",
    "draw_ground_truth",
    "draw_row",
    "overlay",
    "plot_curves",
    "read_history",
    "read_sample",
    "render_report",
    "runs_table",
    "stack",
]
