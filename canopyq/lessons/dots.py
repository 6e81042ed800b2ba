"""``plots.dots``: several measured things in several settings, on one logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from .canvas import COLOURS, FAINT, MARKERS, heading, legend_below, new_figure, styled


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
