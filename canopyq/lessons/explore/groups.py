"""``explore.groups``: how many neighbours share a scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ipywidgets import IntSlider, SelectionSlider, Widget
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from canopyq.tensor.granularity import Granularity
from canopyq.tensor.quantized_tensor import quantize

from ..canvas import BLUE, FAINT, INK, RED, SKY, new_figure, numbers, styled
from ..html import box
from .explorer import Explorer

SIZES = (512, 256, 128, 64, 32, 16, 8)
SHOWN = 512  # values of the row in the picture


@dataclass(frozen=True)
class Cost:
    """What a granularity costs and gives: scales, bits per weight, relative error, share of codes that are zero."""

    scales: int
    bits_per_weight: float
    error: float
    zeros: float


class Groups(Explorer):
    """From one scale for all to one for eight neighbours: how closely they fit, what they cost, what they gain."""

    name = "groups"
    title = "How many weights share a scale?"

    def __init__(self, x: torch.Tensor) -> None:
        x = x.detach().float()
        self.x = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
        self.row = int(self.x.abs().amax(dim=1).argmax())
        self.names = ["tensor", "channel", *(f"g{size}" for size in SIZES if size < self.x.shape[1])]
        self._known: dict[tuple[str, int], Cost] = {}

    def make_controls(self) -> dict[str, Widget]:
        return {
            "scale": SelectionSlider(options=self.names, value="channel", description="a scale per"),
            "bits": IntSlider(4, 2, 8, description="bits"),
        }

    def cost(self, granularity: str, bits: int) -> Cost:
        if (granularity, bits) not in self._known:
            self._known[granularity, bits] = self._cost(granularity, bits)
        return self._known[granularity, bits]

    def _cost(self, granularity: str, bits: int) -> Cost:
        q = quantize(self.x, f"int{bits}", granularity, scale_dtype=torch.bfloat16)
        noise = (q.dequantize() - self.x).square().sum()
        signal = self.x.square().sum()
        error = (noise / signal).sqrt().item() if signal > 0 else 0.0
        return Cost(q.scale.numel(), q.bits_per_value, error, (q.codes == 0).float().mean().item())

    def draw(self, figure: Figure, scale: str, bits: int) -> str:
        self._picture(figure, scale, bits)
        cost = self.cost(scale, bits)
        many = "1 scale" if cost.scales == 1 else f"{cost.scales:,} scales"
        return box(
            "info",
            f"<b>INT{bits}, {scale}</b>: {many}, {cost.bits_per_weight:.3f} bits per weight; "
            f"error {cost.error:.2%} of the weights' size, {cost.zeros:.1%} of the weights become exactly zero.",
        )

    @styled
    def _picture(self, figure: Figure, scale: str, bits: int) -> Figure:
        fig = new_figure(3.0, figure)
        left, right = fig.subplots(1, 2, width_ratios=[3, 2])
        self._rulers(left, scale)
        self._costs(right, scale, bits)
        fig.legend(loc="outside lower center", ncols=3)
        return fig

    def _rulers(self, ax, scale: str) -> None:
        """The magnitudes of one row, and how far each scale reaches over the values that share it."""
        granularity = Granularity.parse(scale)
        reach = granularity.rows(self.x).abs().amax(dim=1, keepdim=True)
        spread = granularity.from_rows(reach.expand(granularity.rows(self.x).shape), self.x.shape)
        values, ends = numbers(self.x[self.row].abs())[:SHOWN], numbers(spread[self.row])[:SHOWN]
        place = np.arange(len(values))
        ax.vlines(place, 0, values, color=SKY, linewidth=0.8, label="size of each weight")
        ax.step(place, ends, where="mid", color=RED, linewidth=1.4, label="how far its scale reaches")
        ax.set_xlim(-1, len(values))
        ax.set_ylim(0, max(float(self.x.abs().max()) * 1.06, 1e-9))
        ax.set(xlabel=f"weights of row {self.row}", ylabel="magnitude")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5))

    def _costs(self, ax, scale: str, bits: int) -> None:
        costs = {name: self.cost(name, bits) for name in self.names}
        along, up = [c.bits_per_weight for c in costs.values()], [100 * c.error for c in costs.values()]
        ax.plot(along, up, color=BLUE, marker="o", markersize=4, linewidth=1.2, label="every place of the slider")
        ax.plot(costs[scale].bits_per_weight, 100 * costs[scale].error, "o", color=INK, markersize=8)
        ax.set_ylim(0, max(*up, 1e-9) * 1.1)
        ax.grid(True, axis="y", linewidth=0.5)
        ax.set(xlabel="bits per weight", ylabel="error (%)")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.spines["left"].set_color(FAINT)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for name in self.names:
            four, three = self.cost(name, 4), self.cost(name, 3)
            cells = [f"{four.scales:,}", f"{four.bits_per_weight:.3f}", f"{four.error:.2%}", f"{four.zeros:.1%}"]
            lines.append([name, *cells, f"{three.error:.2%}"])
        return ["a scale per", "scales", "bits per weight, INT4", "error", "exactly zero", "error, INT3"], lines
