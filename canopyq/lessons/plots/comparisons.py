"""Figures side by side: bytes, shares with their intervals, channels, several things in several settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..canvas import (
    BLUE,
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    RED,
    SKY,
    heading,
    legend_below,
    new_figure,
    numbers,
    styled,
)


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
    ax.bar_label(drawn, labels, padding=4, fontsize=10, color=INK, bbox=paper, zorder=4)
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
        ax.annotate(f"{largest}", (largest, heights[largest]), textcoords="offset points", xytext=(4, -2), fontsize=10)
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
