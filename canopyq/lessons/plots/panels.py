"""Four heatmaps of one quantized tensor: what it was, its codes, what is left of it, and how far that is off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..canvas import (
    WIDTH,
    decimals,
    heading,
    new_figure,
    numbers,
    styled,
)

NUMBERED = 12  # tensors up to this many rows and columns get their numbers written in the cells
CRISP = 30  # with more numbers than this in a panel they are drawn without smooth edges: a third of the bytes
SHOWN = 48  # of larger ones, this many rows and columns are drawn


@styled
def four_panels(
    original: Any, codes: Any, dequantized: Any = None, title: str = "", figure: Figure | None = None
) -> Figure:
    """Four heat maps: what went in, the codes, what comes back, and the difference.

    Args:
        original: a tensor of one or two dimensions (more are flattened to rows).
        codes: the codes, or a quantized tensor that has ``.codes`` and ``.dequantize()``.
        dequantized: the values that the codes stand for; taken from ``codes`` if that is a quantized tensor.
    """
    if dequantized is None:
        codes, dequantized = codes.codes, codes.dequantize()
    x, q, y = (_matrix(v) for v in (original, codes, dequantized))
    whole = x.shape
    if whole[0] > SHOWN or whole[1] > SHOWN:
        x, q, y = (v[:SHOWN, :SHOWN] for v in (x, q, y))
        title = f"{title}  (the first {x.shape[0]} × {x.shape[1]} of {whole[0]} × {whole[1]})".strip()
    rows, columns = x.shape
    grid, size = _arrangement(rows, columns, bool(title))
    fig = new_figure(size, figure)
    heading(fig, title)
    axes = fig.subplots(*grid, squeeze=False).ravel()
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    error = y - x
    reach = np.abs(error).max() or 1.0
    panels = [
        ("original", x, "viridis", low, high),
        ("codes", q, "cividis", q.min(), q.max()),
        ("dequantized", y, "viridis", low, high),
        (f"error, at most {reach if error.any() else 0:.2g}", error, "RdBu_r", -reach, reach),
    ]
    for ax, (name, values, colours, bottom, top) in zip(axes, panels, strict=True):
        _panel(fig, ax, name, values, colours, bottom, top, stacked=grid == (4, 1))
    return fig


def _matrix(values: Any) -> np.ndarray:
    array = numbers(values)
    return array.reshape(1, -1) if array.ndim < 2 else array.reshape(-1, array.shape[-1])


def _arrangement(rows: int, columns: int, titled: bool) -> tuple[tuple[int, int], float]:
    """Rows and columns of panels, and the figure's height, so that written numbers have room."""
    side_by_side = (1, 4), float(np.clip(WIDTH / 4 * 0.94 * rows / columns + (1.05 if titled else 0.8), 1.7, 5.5))
    if max(rows, columns) > NUMBERED:
        return side_by_side
    if rows <= 2 and columns > 2:
        return (4, 1), 4 * (0.34 * rows + 0.42) + 0.4
    if columns <= 6:
        return side_by_side
    return (2, 2), float(np.clip(2 * (WIDTH / 2 * 0.8 * rows / columns + 0.95), 3.5, 8.0))


def _panel(
    fig: Figure, ax: Axes, name: str, values: np.ndarray, colours: str, low: float, high: float, *, stacked: bool
) -> None:
    if low == high:
        low, high = low - 0.5, high + 0.5
    image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto" if stacked else "equal")
    ax.set_title(name, loc="left" if stacked else "center", fontsize=10)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    where = {"location": "right", "pad": 0.01, "aspect": 8} if stacked else {"location": "bottom", "pad": 0.03}
    bar = fig.colorbar(image, ax=ax, shrink=0.9, **where)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(nbins=2)
    bar.ax.tick_params(labelsize=10, length=2)
    bar.update_ticks()
    if max(values.shape) <= NUMBERED:
        width = 0.82 * WIDTH if stacked else 0.235 * WIDTH if values.shape[1] <= 6 else 0.41 * WIDTH
        _write(ax, image, values, 72 * width / values.shape[1])


def _write(ax: Axes, image: mpl.image.AxesImage, values: np.ndarray, room: float) -> None:
    """The number in every cell, dark on light and light on dark, as large as fits into ``room`` points."""
    digits = max(decimals(values) - (values.shape[1] > 8), 0)
    mixed = digits == 0 and bool((values != values.round()).any())  # large ones beside small ones: digits of their own
    texts = {at: f"{value + 0.0:.4g}" if mixed else _number(value, digits) for at, value in np.ndenumerate(values)}
    if _fitting(texts.values(), room) < 6.5:  # too wide: .013 for 0.013
        texts = {at: text.replace("0.", ".", 1) if abs(float(text)) < 1 else text for at, text in texts.items()}
    size = min(max(_fitting(texts.values(), room), 4.5), 8.5)
    crisp = {} if values.size <= CRISP or size < 7 else {"antialiased": False}
    for (i, j), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        colour = "white" if dark else "black"
        ax.text(j, i, texts[i, j], ha="center", va="center", fontsize=size, color=colour, **crisp)


def _fitting(texts: Iterable[str], room: float) -> float:
    """The font size at which the widest text fits: digits are 0.64 em wide, point and minus about half of that."""
    return 0.87 * room / max(sum(0.64 if c.isdigit() else 0.36 for c in text) for text in texts)


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text
