"""Values against the numbers that a format has: on a line, as a staircase, under a histogram."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from ..canvas import (
    BLUE,
    COLOURS,
    FAINT,
    INK,
    ORANGE,
    RED,
    SKY,
    heading,
    legend_below,
    new_figure,
    numbers,
    styled,
)


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
    count, _, _ = ax.hist(data, bins=bins, color=SKY, label=f"{len(data):,} values")
    top = max(count.max(), 1)
    many = len(marks) > 64
    ax.vlines(
        marks,
        0,
        top * (0.08 if many else 1.0),
        color=INK,
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
