"""``explore.turns``: a cache that grows from turn to turn, beside weights that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ipywidgets import IntSlider, Widget
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from canopyq.memory import human

from ..canvas import BLUE, COLOURS, FAINT, INK, ORANGE, legend_below, new_figure, styled
from ..html import box, buttons
from .explorer import Explorer

Grown = Sequence[tuple[int, int]]  # tokens and bytes after each turn


class Turns(Explorer):
    """One chat turn by turn: the cache grows and the weights do not. ``caches`` holds (tokens, bytes) of each turn."""

    name = "turns"
    title = "A chat, turn by turn"

    def __init__(self, caches: Mapping[str, Grown], weights: int) -> None:
        self.caches, self.weights = dict(caches), weights
        self.turns = len(next(iter(self.caches.values())))

    def make_controls(self) -> dict[str, Widget]:
        return {
            "turn": IntSlider(1, 1, self.turns, description="turn"),
            "cache": buttons(list(self.caches)),
        }

    def draw(self, figure: Figure, turn: int, cache: str) -> str:
        self._picture(figure, turn, cache)
        tokens, size = self.caches[cache][turn - 1]
        return box(
            "info",
            f"<b>After turn {turn}</b>: {tokens:,} tokens, and {cache} holds {human(size)}, "
            f"{100 * size / self.weights:.0f} % of the weights' {human(self.weights)}.",
        )

    @styled
    def _picture(self, figure: Figure, turn: int, cache: str) -> Figure:
        fig = new_figure(2.8, figure)
        left, right = fig.subplots(1, 2, width_ratios=[2, 3])
        largest = max(self.weights, *(rows[-1][1] for rows in self.caches.values())) / 1e6
        size = self.caches[cache][turn - 1][1]
        bars = left.bar(["weights", cache], [self.weights / 1e6, size / 1e6], color=[BLUE, ORANGE], width=0.6)
        left.bar_label(bars, [human(self.weights), human(size)], padding=2, fontsize=10, color=INK)
        left.set(ylim=(0, 1.12 * largest), ylabel="MB")
        left.tick_params(axis="x", length=0)
        for colour, (name, rows) in zip(COLOURS[1:], self.caches.items(), strict=False):
            sizes = [size / 1e6 for _, size in rows]
            right.plot(range(1, self.turns + 1), sizes, color=FAINT if name != cache else colour, linewidth=0.8)
            right.plot(range(1, turn + 1), sizes[:turn], color=colour, linewidth=1.8, label=name)
        right.axhline(self.weights / 1e6, color=BLUE, linewidth=1.2, linestyle="--", label="weights")
        right.set(xlim=(1, self.turns), ylim=(0, 1.12 * largest), xlabel="turn", ylabel="MB")
        right.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        legend_below(right, len(self.caches) + 1)
        return fig

    def rows(self) -> tuple[list[str], list[list[str]]]:
        marks = sorted({1, *range(10, self.turns, 10), self.turns})
        lines = []
        for turn in marks:
            sizes = [human(rows[turn - 1][1]) for rows in self.caches.values()]
            lines.append([str(turn), f"{next(iter(self.caches.values()))[turn - 1][0]:,}", *sizes])
        return ["turn", "tokens", *self.caches], lines
