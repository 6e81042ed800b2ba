"""What a bit buys: quality against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from ..canvas import (
    COLOURS,
    MARKERS,
    heading,
    legend_below,
    new_figure,
    styled,
)

# Where a label stands beside its point: offset in points, horizontal and vertical alignment.
PLACES = {
    "left": ((-5, 3), "right", "center"),
    "right": ((6, 3), "left", "center"),
    "above": ((0, 5), "center", "bottom"),
    "below": ((0, -6), "center", "top"),
    "corner": ((-3, -3), "right", "top"),
}


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
            text = {"textcoords": "offset points", "xytext": offset, "ha": across, "va": along, "fontsize": 10}
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
