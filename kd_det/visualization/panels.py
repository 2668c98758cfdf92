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
from matplotlib.gridspec import SubplotSpec
from torch import Tensor

__all__ = ["Chart", "Panel", "Row", "draw_row", "overlay", "shared_limit", "stack"]

_SEQUENTIAL, _DIVERGING = "viridis", "RdBu_r"  # for values from 0 on, and for differences
_OPACITY = 0.7  # of the colours over the grey image
ROW = 5  # panels that a row has place for, at least
_PANEL, _DPI = 2.35, 150  # inches: a row fills the width of an A4 page in landscape, where its letters have 9 points


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


def draw_row(row: Row) -> np.ndarray:
    """A row as a picture, with its title above and a legend below each map: (H, W, 3) uint8, BGR."""
    columns = max(len(row.panels), ROW)
    height = _PANEL * _aspect(row) + (1.1 if _has_legend(row) else 0.6)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9}):
        figure = Figure(figsize=(_PANEL * columns + 0.2, height), layout="constrained", dpi=_DPI)
        figure.suptitle(row.title, x=0.005, ha="left", fontsize=10, fontweight="bold")
        grid = figure.add_gridspec(2, columns, height_ratios=[_aspect(row), 0.045 if _has_legend(row) else 0.001])
        for column, panel in enumerate(row.panels):
            _draw_panel(figure, figure.add_subplot(grid[0, column]), grid[1, column], panel)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR)


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of rows below each other in one, on white."""
    width = max(picture.shape[1] for picture in pictures)
    padded = [np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in pictures]
    return np.concatenate(padded)


def _aspect(row: Row) -> float:
    return max((p.image.shape[0] / p.image.shape[1] for p in row.panels if isinstance(p, Panel)), default=0.75)


def _has_legend(row: Row) -> bool:
    return any(isinstance(panel, Chart) or panel.values is not None for panel in row.panels)


def _draw_panel(figure: Figure, axes, place: SubplotSpec, panel: Panel | Chart) -> None:
    axes.set_title(panel.title)
    if isinstance(panel, Chart):
        axes.plot(panel.values.sort().values.numpy())
        axes.set_xlabel(panel.unit)
        axes.grid(alpha=0.3)
        return
    axes.imshow(overlay(panel, width=round(_PANEL * _DPI))[:, :, ::-1])
    axes.set_xticks([])
    axes.set_yticks([])
    if panel.values is not None:
        extend = "both" if panel.is_difference else "max"
        legend = figure.add_subplot(place)
        figure.colorbar(panel.colours, cax=legend, orientation="horizontal", extend=extend, label=panel.unit)
