"""One thing against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..canvas import (
    COLOURS,
    INK,
    MARKERS,
    heading,
    legend_below,
    new_figure,
    numbers,
    styled,
)


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
