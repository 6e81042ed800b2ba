"""``explore.bits``: bits and the kind of range."""

from __future__ import annotations

import torch
from ipywidgets import IntSlider, Widget
from matplotlib.figure import Figure

from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize

from ..html import box, buttons
from ..plots import histogram_with_grid, staircase
from .explorer import Explorer

RANGES = {
    "symmetric": {"symmetric": True},
    "restricted": {"symmetric": True, "restricted": True},
    "asymmetric": {"symmetric": False},
}
MOST = 2000  # values in the staircase


class Bits(Explorer):
    """Bits from 8 to 2 and the kind of range: the staircase or the histogram, the largest and the mean error."""

    name = "bits"
    title = "How many bits does this tensor need?"

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x.detach().float().flatten()

    def make_controls(self) -> dict[str, Widget]:
        return {
            "bits": IntSlider(4, 2, 8, description="bits"),
            "range": buttons(list(RANGES)),
            "picture": buttons(["staircase", "histogram"]),
        }

    def draw(self, figure: Figure, bits: int, range: str, picture: str) -> str:
        q = quantize(self.x, f"int{bits}", "tensor", **RANGES[range])
        step, largest, mean = self._errors(q)
        if picture == "staircase":
            x = torch.linspace(self.x.min(), self.x.max(), MOST)
            staircase(x, levels(q)[nearest(x, levels(q))], step=step, figure=figure)
        else:
            histogram_with_grid(self.x, levels(q), figure=figure)
        used = q.codes.unique().numel()
        return box(
            "info",
            f"<b>INT{bits}, {range}</b>: step {step:.4g}, largest error {largest:.4g}, mean error {mean:.4g}; "
            f"{used} of {2**bits} codes are used.",
        )

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for bits in (8, 6, 4, 3, 2):
            for name, options in RANGES.items():
                step, largest, mean = self._errors(quantize(self.x, f"int{bits}", "tensor", **options))
                lines.append([str(bits), name, f"{step:.2g}", f"{largest:.2g}", f"{mean:.2g}"])
        return ["bits", "range", "step", "largest error", "mean error"], lines

    def _errors(self, q: QuantizedTensor) -> tuple[float, float, float]:
        error = (q.dequantize() - self.x).abs()
        return q.float_scale().item(), error.max().item(), error.mean().item()


def levels(q: QuantizedTensor) -> torch.Tensor:
    """All values that a tensor with a single scale can take after quantization, ascending."""
    low = q.scheme.format.qmin + q.scheme.restricted
    codes = torch.arange(low, q.scheme.format.qmax + 1)
    zero = 0 if q.zero_point is None else q.zero_point.item()
    return (codes - zero) * q.float_scale().item()


def nearest(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """For each value the index of the nearest number in an ascending grid."""
    return torch.bucketize(x, (grid[1:] + grid[:-1]) / 2)
