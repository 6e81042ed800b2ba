"""The figures of the lessons. Each function returns its Figure; end the cell with ``plt.show()``.

``four_panels`` is the picture that every idea gets. Its friends: ``number_line`` (where a format has numbers), ``bars``
(bytes), ``staircase`` (a value against what is left of it), ``histogram_with_grid`` (data and the levels it must fit),
``curve`` (one thing against another), ``intervals`` (shares and how sure they are), ``trade_off`` (what a bit buys),
``channels`` (how large each channel gets), ``dots`` (several things in several settings).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from .canvas import (
    BLUE,
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    ORANGE,
    RED,
    SKY,
    WIDTH,
    decimals,
    heading,
    legend_below,
    new_figure,
    numbers,
    styled,
)

__all__ = [
    "bars",
    "channels",
    "curve",
    "dots",
    "four_panels",
    "histogram_with_grid",
    "intervals",
    "number_line",
    "staircase",
    "trade_off",
]


# Of four panels.
NUMBERED = 12  # tensors up to this many rows and columns get their numbers written in the cells
CRISP = 30  # with more numbers than this in a panel they are drawn without smooth edges: a third of the bytes
SHOWN = 48  # of larger ones, this many rows and columns are drawn
# Where a label stands beside its point: offset in points, horizontal and vertical alignment.
PLACES = {
    "left": ((-5, 3), "right", "center"),
    "right": ((6, 3), "left", "center"),
    "above": ((0, 5), "center", "bottom"),
    "below": ((0, -6), "center", "top"),
    "corner": ((-3, -3), "right", "top"),
}


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
    ax.set_title(name, loc="left" if stacked else "center", fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    where = {"location": "right", "pad": 0.01, "aspect": 8} if stacked else {"location": "bottom", "pad": 0.03}
    bar = fig.colorbar(image, ax=ax, shrink=0.9, **where)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(nbins=2 if stacked else 3)
    bar.ax.tick_params(labelsize=7, length=2)
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


@styled
def number_line(
    values_by_format: Mapping[str, Any],
    title: str = "",
    linear_below: float | None = None,
    xlabel: str = "value (logarithmic away from zero)",
    figure: Figure | None = None,
) -> Figure:
    """Where the representable numbers lie: one row of marks a format.

    Args:
        values_by_format: for each format all of its values; infinities and NaN are left out.
        linear_below: the axis is linear between minus and plus this; by default the smallest positive value of all.
            Infinity makes the whole axis linear.
    """
    rows = {name: np.unique(v[np.isfinite(v)]) for name, v in ((n, numbers(v)) for n, v in values_by_format.items())}
    positive = [v[v > 0].min() for v in rows.values() if (v > 0).any()]
    threshold = linear_below if linear_below is not None else min(positive)
    reach = max(np.abs(v).max() for v in rows.values())
    fig = new_figure(0.42 * len(rows) + 1.1, figure)
    heading(fig, title)
    ax = fig.subplots()
    linear = not np.isfinite(threshold) or threshold >= reach
    to_axis = (lambda v: v / reach) if linear else (lambda v: np.sign(v) * np.log1p(np.abs(v) / threshold))
    for row, values in enumerate(rows.values()):
        place = np.round(to_axis(values) / np.abs(to_axis(np.array([reach]))) * 900)
        _, first = np.unique(place, return_index=True)  # one mark a pixel is enough
        ax.vlines(values[first], row - 0.32, row + 0.32, color=COLOURS[row % 6], linewidth=0.9)
        if len(first) < len(values):
            ax.hlines(row, values.min(), values.max(), color=COLOURS[row % 6], linewidth=0.5)
    ax.set_yticks(range(len(rows)), [f"{name}\n{len(values):,} values" for name, values in rows.items()])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(-reach * 1.1, reach * 1.1)
    if linear:
        ax.xaxis.set_major_locator(MaxNLocator(9))
    else:
        ax.set_xscale("symlog", linthresh=threshold)
        ax.set_xticks(_decades(threshold, reach))
        ax.xaxis.set_minor_locator(NullLocator())
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(xlabel)
    return fig


def _decades(threshold: float, reach: float) -> list[float]:
    """Powers of ten for a symmetric logarithmic axis: zero and up to five a side, none crowded against zero."""
    top, bottom = math.floor(math.log10(reach)), math.ceil(math.log10(threshold))
    every = max(1, math.ceil((top - bottom) / 5))
    right = [10.0**k for k in range(top, bottom, -every) if k - bottom >= (top - bottom) * 0.15]
    return [*(-tick for tick in right), 0.0, *reversed(right)]


@styled
def bars(
    values: Mapping[str, float],
    unit: str = "GB",
    title: str = "",
    budget: float | None = None,
    fmt: str = ".3g",
    figure: Figure | None = None,
) -> Figure:
    """Labelled horizontal bars. With a ``budget`` a line is drawn there, and bars beyond it change colour."""
    names, sizes = list(values), [float(v) for v in values.values()]
    fig = new_figure(0.34 * len(names) + 0.9, figure)
    heading(fig, title)
    ax = fig.subplots()
    over = [budget is not None and size > budget for size in sizes]
    drawn = ax.barh(names, sizes, color=[RED if o else BLUE for o in over], height=0.62)
    labels = [f"{size:{fmt}} {unit}{'  too much' if o else ''}".rstrip() for size, o in zip(sizes, over, strict=True)]
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    ax.bar_label(drawn, labels, padding=4, fontsize=8, color=INK, bbox=paper, zorder=4)
    ax.set_xlim(0, max([*sizes, budget or 0]) * 1.2 or 1)
    if budget is not None:
        ax.axvline(budget, color=INK, linewidth=1.2, linestyle="--")
        ax.set_xlabel(f"{unit}   (dashed line: the budget, {budget:{fmt}} {unit})")
    else:
        ax.set_xlabel(unit)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(8))
    return fig


@styled
def staircase(
    x: Any, dequantized: Any, title: str = "", step: float | None = None, figure: Figure | None = None
) -> Figure:
    """Above: each value against what is left of it. Below: the error, with the bound of half a ``step`` if given."""
    a, b = numbers(x).ravel(), numbers(dequantized).ravel()
    order = np.argsort(a, kind="stable")
    a, b = a[order], b[order]
    fig = new_figure(4.0, figure)
    heading(fig, title)
    top, below = fig.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    top.plot(a, a, color=FAINT, linewidth=1, linestyle="--", label="no quantization")
    marks = {"marker": ".", "markersize": 3} if len(a) <= 300 else {}
    top.plot(a, b, color=BLUE, linewidth=1.4, drawstyle="steps-mid", label="after quantization", **marks)
    top.set_ylabel("value kept")
    below.axhline(0, color=FAINT, linewidth=0.8)
    sparse = {"linestyle": "none", "marker": ".", "markersize": 3} if len(a) <= 1000 else {}
    below.plot(a, b - a, color=RED, linewidth=1.0, label="error", **sparse)
    if step is not None:
        for side in (-step / 2, step / 2):
            below.axhline(side, color=ORANGE, linewidth=1, linestyle=":", label="± half a step" if side > 0 else None)
    below.set_ylabel("error")
    below.set_xlabel("original value")
    handles = [h for ax in (top, below) for h in ax.get_legend_handles_labels()[0]]
    fig.legend(handles, [h.get_label() for h in handles], loc="outside lower center", ncols=4)
    for ax in (top, below):
        ax.yaxis.set_major_locator(MaxNLocator(5))
    return fig


@styled
def histogram_with_grid(
    x: Any,
    levels: Any,
    title: str = "",
    bins: int = 80,
    limits: tuple[float, float] | None = None,
    xlim: tuple[float, float] | None = None,
    figure: Figure | None = None,
) -> Figure:
    """How often each value occurs, and the ``levels`` that quantization leaves.

    ``limits`` marks a clipped range; ``xlim`` sets the axis, so that two pictures can be compared.
    """
    data, marks = numbers(x).ravel(), np.unique(numbers(levels))
    fig = new_figure(2.8, figure)
    heading(fig, title)
    ax = fig.subplots()
    count, _, _ = ax.hist(data, bins=bins, color="#9ecae1", label=f"{len(data):,} values")
    top = max(count.max(), 1)
    many = len(marks) > 64
    ax.vlines(
        marks,
        0,
        top * (0.08 if many else 1.0),
        color=BLUE,
        linewidth=0.5 if many else 0.9,
        label=f"{len(marks)} levels",
    )
    if xlim is not None:
        ax.set_xlim(*xlim)
    for i, edge in enumerate(limits or ()):
        ax.axvline(edge, color=RED, linewidth=1.5, linestyle="--", label="clipped beyond" if i == 0 else None)
    ax.set_ylim(0, top * 1.06)
    ax.set_xlabel("value")
    ax.set_ylabel("how many")
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend_below(ax)
    return fig


@styled
def curve(
    x: Sequence[float],
    ys: Mapping[str, Sequence[float]],
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    log: str = "",
    mark: float | None = None,
    figure: Figure | None = None,
) -> Figure:
    """One line a series over a shared ``x``. ``log`` is "x", "y" or "xy"; ``mark`` draws a vertical line there."""
    fig = new_figure(3.2, figure)
    heading(fig, title)
    ax = fig.subplots()
    along = numbers(x)
    for i, (name, values) in enumerate(ys.items()):
        marker = MARKERS[i % len(MARKERS)] if len(along) <= 40 else None
        ax.plot(
            along,
            numbers(values),
            color=COLOURS[i % len(COLOURS)],
            marker=marker,
            markersize=4,
            linewidth=1.5,
            label=name,
        )
    if mark is not None:
        ax.axvline(mark, color=INK, linewidth=1, linestyle="--")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if "x" in log:
        ax.set_xscale("log", base=2)
        ax.set_xticks(along, [f"{v:g}" for v in along]) if len(along) <= 12 else None
        ax.xaxis.set_minor_locator(NullLocator())
    if "y" in log:
        ax.set_yscale("log")
    ax.grid(True, axis="y", linewidth=0.6)
    if len(ys) > 1:
        legend_below(ax)
    return fig


@styled
def intervals(
    shares: Mapping[str, tuple[float, float, float]],
    xlabel: str = "",
    title: str = "",
    start: float | None = None,
    figure: Figure | None = None,
) -> Figure:
    """A dot with its interval for each name: ``shares[name]`` is (value, low, high), each between 0 and 1.

    The axis begins at ``start``, by default a little below the lowest interval and at most at 0.5.
    """
    names = list(shares)
    value, low, high = (np.array(column) for column in zip(*shares.values(), strict=True))
    fig = new_figure(0.24 * len(names) + 0.9, figure)
    heading(fig, title)
    ax = fig.subplots()
    place = np.arange(len(names))
    ax.hlines(place, low, high, color=SKY, linewidth=4)
    ax.plot(value, place, "o", color=BLUE, markersize=5)
    ax.set_yticks(place, names)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(min(0.5, low.min()) - 0.01 if start is None else start - 0.01, 1.01)
    ax.grid(True, axis="x", linewidth=0.6)
    ax.set_xlabel(xlabel)
    return fig


@styled
def channels(magnitudes: Mapping[str, Any], title: str = "", figure: Figure | None = None) -> Figure:
    """One panel for each name: the largest magnitude of every channel (K,), the outlier in another colour."""
    fig = new_figure(2.5, figure)
    heading(fig, title)
    panels = fig.subplots(1, len(magnitudes), squeeze=False)[0]
    for i, (ax, (name, values)) in enumerate(zip(panels, magnitudes.items(), strict=True)):
        heights = numbers(values)
        place, largest = np.arange(len(heights)), int(heights.argmax())
        ax.vlines(place, 0, heights, color=BLUE, linewidth=0.8)
        ax.vlines(largest, 0, heights[largest], color=RED, linewidth=2, label="the largest" if not i else None)
        ax.axhline(np.median(heights), color=INK, linewidth=1, linestyle="--", label=None if i else "the median")
        ax.set(title=name, xlabel="channel", ylim=(0, 1.08 * max(heights.max(), 1e-9)))
        ax.annotate(f"{largest}", (largest, heights[largest]), textcoords="offset points", xytext=(4, -2), fontsize=8)
    panels[0].set_ylabel("largest magnitude")
    legend_below(panels[0])
    return fig


@styled
def dots(
    series: Mapping[str, Mapping[str, float]], xlabel: str = "", title: str = "", figure: Figure | None = None
) -> Figure:
    """A line for each setting and a mark for each series that has one there: ``series[name][setting]``."""
    settings = list(dict.fromkeys(setting for values in series.values() for setting in values))
    fig = new_figure(0.42 * len(settings) + 1.3, figure)
    heading(fig, title)
    ax = fig.subplots()
    ax.hlines(range(len(settings)), *_ends(series), color=FAINT, linewidth=0.6, zorder=0)
    for i, (name, values) in enumerate(series.items()):
        ax.plot(
            list(values.values()),
            [settings.index(setting) for setting in values],
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            linestyle="",
            markersize=6,
            label=name,
        )
    ax.set_xscale("log")
    ax.set_xlabel(xlabel)
    ax.set_yticks(range(len(settings)), settings)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(settings) - 0.5, -0.5)
    ax.grid(True, axis="x", linewidth=0.5)
    legend_below(ax)
    return fig


def _ends(series: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    every = [value for values in series.values() for value in values.values()]
    return min(every) / 1.3, max(every) * 1.3


@styled
def trade_off(
    series: Mapping[str, Mapping[str, tuple[float, float, tuple[float, float, float]]]],
    places: Mapping[str, str] | None = None,
    ylabel: str = "KL, nats per token (log)",
    title: str = "",
    figure: Figure | None = None,
) -> Figure:
    """Damage and right answers against bits per weight, in one figure.

    Args:
        series: for each series its points by name: bits per weight, damage, and the share of right answers as (value,
            low, high).
        places: for the names of points, where the name is written: left, right, above (the default), below, corner.
    """
    fig = new_figure(4.8, figure)
    heading(fig, title)
    top, below = fig.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for i, (name, points) in enumerate(series.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        bits, damage, shares = zip(*points.values(), strict=True)
        top.plot(bits, damage, color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
        for label, x, y in zip(points, bits, damage, strict=True):
            offset, across, along = PLACES[(places or {}).get(label, "above")]
            text = {"textcoords": "offset points", "xytext": offset, "ha": across, "va": along, "fontsize": 7.5}
            top.annotate(label, (x, y), color=colour, **text)
        _with_intervals(below, bits, shares, colour, marker)
    top.set_yscale("log")
    top.margins(y=0.1)
    top.yaxis.set_minor_locator(NullLocator())
    top.set_ylabel(ylabel)
    below.set(xlabel="bits per weight, scales included", ylabel="right answers")
    below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    below.yaxis.set_major_locator(MaxNLocator(4))
    first = min(x for points in series.values() for x, *_ in points.values())
    last = max(x for points in series.values() for x, *_ in points.values())
    below.set_xlim(first - 0.08 * (last - first or 1), last + 0.06 * (last - first or 1))
    for ax in (top, below):
        ax.grid(True, axis="y", linewidth=0.6)
    legend_below(top)
    return fig


def _with_intervals(ax, bits: Sequence[float], shares: Sequence[tuple], colour: str, marker: str) -> None:
    value, low, high = zip(*shares, strict=True)
    ax.vlines(bits, low, high, color=colour, linewidth=2, alpha=0.4)
    ax.plot(bits, value, color=colour, marker=marker, markersize=4, linewidth=1)
