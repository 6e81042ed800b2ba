"""``explore.rounding``: two weights on a grid, and which grid point leaves the output nearest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ipywidgets import FloatSlider, Widget
from matplotlib.figure import Figure

from ..canvas import BLUE, FAINT, INK, ORANGE, legend_below, new_figure, styled
from ..html import box
from .explorer import Explorer

CORRELATIONS = (0.95, 0.5, 0.0, -0.5, -0.95)


@dataclass(frozen=True)
class Choice:
    """A grid point (whole numbers: the step is 1), and the mean squared error of the output that it leaves."""

    point: tuple[int, int]
    error: float


class Rounding(Explorer):
    """Two weights whose inputs go together more or less: the nearest grid point, and the one nearest in the output."""

    name = "rounding"
    title = "Two weights on a grid"

    def __init__(self, first: float, second: float) -> None:
        self.weights = first, second

    def make_controls(self) -> dict[str, Widget]:
        first, second = self.weights
        return {
            "correlation": FloatSlider(0.9, min=-0.98, max=0.98, step=0.02, description="correlation"),
            "first": FloatSlider(first, min=-1.5, max=1.5, step=0.02, description="weight 1"),
            "second": FloatSlider(second, min=-1.5, max=1.5, step=0.02, description="weight 2"),
        }

    @staticmethod
    def error(weights: tuple[float, float], point: tuple[float, float], correlation: float) -> float:
        """E (y − ŷ)² = e H eᵀ."""
        e = torch.tensor(weights, dtype=torch.float64) - torch.tensor(point, dtype=torch.float64)
        hessian = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
        return float(e @ hessian @ e)

    def choices(self, weights: tuple[float, float], correlation: float) -> tuple[Choice, Choice]:
        """Each weight rounded alone, and the best of all grid points near by."""
        nearest = (round(weights[0]), round(weights[1]))
        points = [(nearest[0] + i, nearest[1] + j) for i in range(-3, 4) for j in range(-3, 4)]
        found = [Choice(point, self.error(weights, point, correlation)) for point in points]
        alone = Choice(nearest, self.error(weights, nearest, correlation))
        best = min(found, key=lambda choice: choice.error)
        return alone, alone if alone.error <= best.error * (1 + 1e-9) else best

    def draw(self, figure: Figure, correlation: float, first: float, second: float) -> str:
        weights = (first, second)
        alone, best = self.choices(weights, correlation)
        self._picture(figure, weights, correlation, alone, best)
        same = "the same point" if alone == best else f"{alone.error / max(best.error, 1e-12):.1f} times less"
        return box(
            "info",
            f"<b>Correlation {correlation:.2f}</b>: each weight alone goes to {alone.point}, output error "
            f"{alone.error:.3f}. The best point is {best.point}, error {best.error:.3f}: {same}.",
        )

    @styled
    def _picture(
        self, figure: Figure, weights: tuple[float, float], correlation: float, alone: Choice, best: Choice
    ) -> Figure:
        fig = new_figure(3.6, figure)
        ax = fig.subplots()
        along = np.linspace(-2.5, 2.5, 121)
        x, y = np.meshgrid(along, along)
        dx, dy = x - weights[0], y - weights[1]
        ax.contour(x, y, dx**2 + dy**2 + 2 * correlation * dx * dy, levels=[0.05, 0.2, 0.5, 1, 2, 4], colors=FAINT,
                   linewidths=0.8)  # fmt: skip
        grid = np.arange(-2, 3)
        gx, gy = np.meshgrid(grid, grid)
        ax.plot(gx.ravel(), gy.ravel(), ".", color=INK, markersize=4, label="grid points")
        ax.plot(*weights, "+", color=INK, markersize=11, markeredgewidth=2, label="the weights")
        ax.plot(*alone.point, "o", color=ORANGE, markersize=11, markerfacecolor="none", markeredgewidth=2,
                label="each rounded alone")  # fmt: skip
        ax.plot(*best.point, "s", color=BLUE, markersize=6, label="least output error")
        ax.set(xlabel="weight 1", ylabel="weight 2", aspect="equal", xlim=(-2.4, 2.4), ylim=(-2.4, 2.4))
        legend_below(ax)
        return fig

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for correlation in CORRELATIONS:
            alone, best = self.choices(self.weights, correlation)
            lines.append(
                [f"{correlation:g}", str(alone.point), f"{alone.error:.3f}", str(best.point), f"{best.error:.3f}"]
            )
        return ["correlation", "each alone", "output error", "best", "output error"], lines
