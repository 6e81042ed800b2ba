"""``explore.clip``: a narrower range rounds more finely and clips more."""

from __future__ import annotations

import torch
from ipywidgets import FloatSlider, IntSlider, Widget
from matplotlib.figure import Figure

from ..canvas import BLUE, FAINT, GREEN, INK, RED, SKY, new_figure, numbers, styled
from ..html import box
from ..saturation import Clipped, clipped
from .explorer import Explorer

SHARES = [s / 100 for s in range(5, 101, 5)]


class Clip(Explorer):
    """Move the end of the range: what clipping costs, what rounding costs, and their sum."""

    name = "clip"
    title = "Where to cut the range"

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x.detach().float().flatten()
        self.absmax = self.x.abs().max()
        self.values, self.counts = self.x.unique(return_counts=True)  # weights of 16 bits take few values
        self._known: dict[tuple[float, int], Clipped] = {}

    def make_controls(self) -> dict[str, Widget]:
        return {
            "clip": FloatSlider(1.0, min=0.05, max=1.0, step=0.01, description="clip at", readout_format=".0%"),
            "bits": IntSlider(4, 2, 8, description="bits"),
        }

    def at(self, share: float, bits: int) -> Clipped:
        """What becomes of the values if the range ends at this share of absmax."""
        if (share, bits) not in self._known:
            self._known[share, bits] = clipped(self.values, self.absmax * share, f"int{bits}", self.counts)
        return self._known[share, bits]

    def draw(self, figure: Figure, clip: float, bits: int) -> str:
        here = self.at(clip, bits)
        self._picture(figure, clip, bits)
        end = self.absmax.item() * clip
        best = self.best(bits)
        return box(
            "info",
            f"<b>Range ±{end:.4g}</b> ({clip:.0%} of the largest magnitude, {here.share:.2%} of the values lie beyond"
            f"). Mean squared error: clipping {here.clipping:.3g} + rounding {here.rounding:.3g} = <b>{here.error:.3g}"
            f"</b>; least of the curve: {self.at(best, bits).error:.3g} at {best:.0%}.",
        )

    def best(self, bits: int) -> float:
        """The share of absmax with the least total error, of those on the curve."""
        return min(SHARES, key=lambda share: self.at(share, bits).error)

    @styled
    def _picture(self, figure: Figure, clip: float, bits: int) -> Figure:
        fig = new_figure(2.9, figure)
        left, right = fig.subplots(1, 2)
        left.hist(numbers(self.values), bins=80, weights=numbers(self.counts), color=SKY, log=True)
        end = self.absmax.item() * clip
        for side in (-end, end):
            left.axvline(side, color=RED, linewidth=1.5, linestyle="--")
        left.minorticks_off()
        left.set(xlabel="value (dashed: where the range ends)", ylabel="how many (log)")
        pairs = [(self.at(share, bits).clipping, self.at(share, bits).rounding) for share in SHARES]
        right.plot(SHARES, [c for c, _ in pairs], color=RED, label="clipping", marker="s", markersize=3)
        right.plot(SHARES, [r for _, r in pairs], color=BLUE, label="rounding", marker="o", markersize=3)
        right.plot(SHARES, [c + r for c, r in pairs], color=GREEN, linewidth=2, label="total")
        right.axvline(clip, color=INK, linewidth=1, linestyle="--")
        right.set_yscale("symlog", linthresh=max(min(r for _, r in pairs), 1e-12))
        right.set_ylim(0, 2 * max(c + r for c, r in pairs) or 1)
        right.minorticks_off()
        right.grid(True, axis="y", linewidth=0.5)
        right.set(xlabel="clip at (share of the largest magnitude)", ylabel="mean squared error")
        right.xaxis.set_major_formatter("{x:.0%}")
        right.spines["left"].set_color(FAINT)
        fig.legend(loc="outside lower center", ncols=3)
        return fig

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for bits in (8, 4, 3, 2):
            best = self.best(bits)
            whole, cut = self.at(1.0, bits).error, self.at(best, bits).error
            lines.append([str(bits), f"{whole:.2g}", f"{best:.0%}", f"{cut:.2g}"])
        return ["bits", "mean squared error, whole range", "best clip", "mean squared error there"], lines
