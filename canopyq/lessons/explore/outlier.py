"""``explore.outlier``: one value grows, and takes the codes of all others with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ipywidgets import FloatLogSlider, IntSlider, Widget
from matplotlib.figure import Figure

from canopyq.tensor.quantized_tensor import quantize

from ..canvas import BLUE, FAINT, INK, RED, new_figure, numbers, styled
from ..html import box
from .explorer import Explorer

SIZES = (2.0, 8.0, 32.0, 127.5, 500.0, 2000.0)


@dataclass(frozen=True)
class Crushed:
    """What an outlier leaves of the other values: the step, their codes, the error in per cent of their size."""

    step: float
    codes: int
    zeros: float
    error: float
    restored: torch.Tensor


class Outlier(Explorer):
    """One large value beside ordinary ones: the step, how many codes are left to the others, their error."""

    name = "outlier"
    title = "One value grows, the others pay"

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x.detach().float().flatten()

    def make_controls(self) -> dict[str, Widget]:
        return {
            "outlier": FloatLogSlider(2.0, base=10, min=0.3, max=3.3, step=0.02, description="outlier",
                                      readout_format=".4g"),
            "bits": IntSlider(8, 2, 8, description="bits"),
        }  # fmt: skip

    def crushed(self, outlier: float, bits: int) -> Crushed:
        """What is left of the ordinary values if the largest one is ``outlier``."""
        q = quantize(torch.cat([self.x, self.x.new_tensor([outlier])]), f"int{bits}")
        codes, restored = q.codes[:-1], q.dequantize()[:-1]
        size = self.x.norm().clamp(min=torch.finfo(torch.float32).tiny)
        error = ((restored - self.x).norm() / size).item()
        return Crushed(q.scale.item(), len(codes.unique()), (codes == 0).float().mean().item(), error, restored)

    def draw(self, figure: Figure, outlier: float, bits: int) -> str:
        here = self.crushed(outlier, bits)
        self._picture(figure, outlier, bits, here)
        return box(
            "info",
            f"<b>Outlier {outlier:.4g}, INT{bits}</b>: one step is {here.step:.3g}. Codes left to the other "
            f"{len(self.x)} values: {here.codes}. Of them {here.zeros:.0%} become 0; the error "
            f"is {here.error:.1%} of their size.",
        )

    @styled
    def _picture(self, figure: Figure, outlier: float, bits: int, here: Crushed) -> Figure:
        fig = new_figure(2.9, figure)
        left, right = fig.subplots(1, 2)
        order = self.x.argsort()
        place = np.arange(len(self.x))
        left.plot(place, numbers(self.x[order]), ".", color=FAINT, markersize=4, label="ordinary values, sorted")
        left.step(place, numbers(here.restored[order]), where="mid", color=BLUE, linewidth=1.4, label="what is left")
        reach = 1.15 * max(float(self.x.abs().max()), 1e-9)
        left.set(xlabel="value number", ylabel="value", ylim=(-reach, reach))
        along = np.geomspace(2, 2000, 40)
        right.plot(along, [100 * self.crushed(size, bits).zeros for size in along], color=RED, label="become 0")
        right.axvline(outlier, color=INK, linewidth=1, linestyle="--")
        right.set_xscale("log")
        right.set(xlabel="size of the outlier (log)", ylabel="% of the ordinary values", ylim=(-3, 103))
        right.grid(True, axis="y", linewidth=0.5)
        fig.legend(loc="outside lower center", ncols=3)
        return fig

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for size in SIZES:
            eight, four = self.crushed(size, 8), self.crushed(size, 4)
            cells = [f"{eight.step:.3g}", str(eight.codes), f"{eight.zeros:.0%}", f"{eight.error:.1%}"]
            lines.append([f"{size:g}", *cells, f"{four.zeros:.0%}"])
        return ["outlier", "INT8: step", "codes of the others", "become 0", "error", "INT4: become 0"], lines
