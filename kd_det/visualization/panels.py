"""Panels of a picture, and rows of panels in one figure with titles, legends and scales."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["Chart", "Panel", "Row", "draw_rows", "overlay", "shared_limit"]

_SEQUENTIAL, _DIVERGING = "viridis", "RdBu_r"  # for values from 0 on, and for differences
_OPACITY = 0.7  # of the colours over the grey image
_PANEL = 2.35  # inches: five panels side by side fill the width of an A4 page in landscape at their own size


@dataclass(frozen=True)
class Panel:
    """
    An image, alone or under a map in colours.

    Attributes:
        title: above it.
        image: (H, W, 3) uint8, BGR.
        values: (h, w), stretched over the image; each cell stays visible as such.
        limit: the colours' end; they begin at 0 or, for a difference, at ``-limit``.
        unit: what the legend says of the values.
        is_difference: whether 0 is the middle of the colours.
    """

    title: str
    image: np.ndarray
    values: Tensor | None = None
    limit: float = 1.0
    unit: str = ""
    is_difference: bool = False

    @property
    def colours(self) -> ScalarMappable:
        low = -self.limit if self.is_difference else 0.0
        return ScalarMappable(Normalize(low, self.limit), _DIVERGING if self.is_difference else _SEQUENTIAL)


@dataclass(frozen=True)
class Chart:
    """Values of the channels in a panel of their own, sorted."""

    title: str
    values: Tensor
    unit: str = ""


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel | Chart]


def shared_limit(maps: Sequence[Tensor]) -> float:
    """The end of a scale for several maps: the 99th percentile of their magnitudes, so that one peak hides no rest."""
    limit = np.quantile(np.concatenate([value.abs().numpy().ravel() for value in maps]), 0.99)
    return float(limit) or 1.0


def overlay(panel: Panel, *, width: int = 360) -> np.ndarray:
    """A panel without its title and legend: (H, width, 3) uint8, BGR."""
    height = max(round(panel.image.shape[0] * width / panel.image.shape[1]), 1)
    shrinks = width < panel.image.shape[1]
    image = cv2.resize(panel.image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if panel.values is None:
        return image
    # OpenCV lacks a diverging colour map, and the legend is to have the very colours: matplotlib's, for both.
    table = (panel.colours.to_rgba(np.linspace(*panel.colours.get_clim(), 256))[:, None, 2::-1] * 255).astype(np.uint8)
    low, high = panel.colours.get_clim()
    levels = ((panel.values.numpy() - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
    levels = cv2.resize(levels, (width, height), interpolation=cv2.INTER_NEAREST)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.addWeighted(cv2.applyColorMap(levels, table), _OPACITY, grey, 1 - _OPACITY, 0)


def draw_rows(rows: Sequence[Row]) -> np.ndarray:
    """One picture of rows of panels, with a title above each row and a legend beside each map: (H, W, 3) uint8, BGR."""
    columns = max(len(row.panels) for row in rows)
    heights = [_PANEL * _aspect(row) + (1.1 if _has_legend(row) else 0.6) for row in rows]
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9, "figure.dpi": 150}):
        figure = Figure(figsize=(_PANEL * max(columns, 2) + 0.2, sum(heights)), layout="constrained")
        parts = np.atleast_1d(figure.subfigures(len(rows), height_ratios=heights))
        for part, row in zip(parts, rows):
            part.suptitle(row.title, x=0.005, ha="left", fontsize=10, fontweight="bold")
            ratios = [_aspect(row), 0.045 if _has_legend(row) else 0.001]
            panels, legends = part.subplots(2, max(columns, 2), squeeze=False, height_ratios=ratios)
            for axes, legend, panel in zip(panels, legends, [*row.panels, *[None] * len(panels)]):
                _draw_panel(part, axes, legend, panel)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR)


def _aspect(row: Row) -> float:
    return max((p.image.shape[0] / p.image.shape[1] for p in row.panels if isinstance(p, Panel)), default=0.75)


def _has_legend(row: Row) -> bool:
    return any(isinstance(panel, Chart) or panel.values is not None for panel in row.panels)


def _draw_panel(part, axes, legend, panel: Panel | Chart | None) -> None:
    if not isinstance(panel, Panel) or panel.values is None:
        legend.set_axis_off()
    if panel is None:
        axes.set_axis_off()
        return
    axes.set_title(panel.title)
    if isinstance(panel, Chart):
        axes.plot(panel.values.sort().values.numpy())
        axes.set_xlabel(panel.unit)
        axes.grid(alpha=0.3)
        return
    axes.imshow(overlay(panel, width=720)[:, :, ::-1])
    axes.set_xticks([])
    axes.set_yticks([])
    if panel.values is not None:
        extend = "both" if panel.is_difference else "max"
        part.colorbar(panel.colours, cax=legend, orientation="horizontal", extend=extend, label=panel.unit)
