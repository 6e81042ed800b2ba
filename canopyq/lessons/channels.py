"""How large each channel gets: a bar a channel, with the typical one marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .canvas import BLUE, INK, RED, heading, legend_below, new_figure, numbers, styled


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
