"""The style that all figures share: eight inches wide, small files, colours that colour-blind eyes tell apart."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib_inline.config import InlineBackend

WIDTH, DPI = 8.0, 96
INK, FAINT = "#24292f", "#868f99"
# Okabe and Ito's, darkened until each stands out from white by 3 to 1, and by 4.5 where it colours text. In the whole
# course BLUE is the original or what is right, RED an error or what is broken, GREEN a sum or a cure, SKY the data.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#A06700", "#008060", "#B3261E", "#A85082", "#3A8FC7"
COLOURS = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, INK]
MARKERS = "osD^vPX"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "figure.titlesize": 12,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#d8dee4",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
}


def styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a plotting function under the course's style; ``figure=`` draws into a given figure instead of a new one."""

    @functools.wraps(plot)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with plt.rc_context(STYLE):
            return plot(*args, **kwargs)

    return wrapper


def new_figure(height: float, figure: Figure | None = None, width: float = WIDTH) -> Figure:
    """An empty figure of the course's width. Without ``figure`` it is pyplot's, so that ``plt.show()`` shows it."""
    if figure is None:
        return plt.figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.clear()
    figure.set_size_inches(width, height)
    figure.set_dpi(DPI)
    figure.set_layout_engine("constrained", w_pad=0.15)  # room for a longer number: see `Explorer`
    return figure


def sharpen() -> None:
    """Let notebooks show matplotlib's pictures with twice the dots at the same size, sharp on fine screens too."""
    if (shell := get_ipython()) is not None:
        InlineBackend.instance(parent=shell).figure_formats = {"retina"}


def detached() -> Figure:
    """A figure that pyplot knows nothing of, for pictures that a slider redraws."""
    return Figure(figsize=(WIDTH, 3), dpi=DPI, layout="constrained")


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def numbers(x: Any) -> np.ndarray:
    """A tensor, array or list as a float64 array."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", torch.float64).numpy()
    return np.asarray(x, dtype=np.float64)


def heading(figure: Figure, title: str) -> None:
    """The figure's title, flush left."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")


def legend_below(axes: Axes, columns: int | None = None) -> None:
    """A legend under the axes, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure = axes.get_figure()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns or min(len(labels), 4))


def decimals(values: Sequence[float] | np.ndarray) -> int:
    """How many digits after the point show these numbers in about three figures."""
    finite = np.abs(np.asarray(values, dtype=np.float64))
    finite = finite[np.isfinite(finite)]
    top = finite.max() if finite.size else 0.0
    if top == 0 or np.all(finite == np.round(finite)):
        return 0
    return (
        int(np.clip(1 - np.floor(np.log10(top)), 0, 6)) if top < 1 else int(np.clip(2 - np.floor(np.log10(top)), 0, 2))
    )
