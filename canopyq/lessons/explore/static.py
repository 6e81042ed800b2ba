"""``explore.static``: one fixed range for all tokens, and what it does to each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ipywidgets import FloatLogSlider, IntSlider, Widget
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from canopyq.tensor import affine

from ..canvas import BLUE, INK, RED, new_figure, numbers, styled
from ..html import box
from .explorer import Explorer

SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
TINY = 1e-6  # the axes are logarithmic
MUCH = 0.1  # a token that is off by more than this is counted


@dataclass(frozen=True)
class Fixed:
    """What a fixed range leaves of the tokens.

    Attributes:
        error: ‖x̂ − x‖ / ‖x‖ of each token.
        whole: the same of all tokens together.
        clipped: tokens with values beyond the range.
    """

    error: Tensor
    whole: float
    clipped: int

    @property
    def spoiled(self) -> int:
        """Tokens that are off by more than 10 %."""
        return int((self.error > MUCH).sum())


class Static(Explorer):
    """Where the one range of all tokens (tokens, features) ends: who is clipped, who vanishes, beside own ranges."""

    name = "static"
    title = "One range for all tokens"

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach().float()
        self.size = self.x.abs().amax(dim=1)
        self.absmax = float(self.size.max())
        self._known: dict[tuple[float, int], Fixed] = {}

    def make_controls(self) -> dict[str, Widget]:
        return {
            "reach": FloatLogSlider(1.0, base=10, min=-2, max=0, step=0.02, description="range", readout_format=".0%"),
            "bits": IntSlider(8, 4, 8, description="bits"),
        }

    def fixed(self, share: float, bits: int) -> Fixed:
        """One range for all, which ends at this share of the largest magnitude."""
        if (share, bits) not in self._known:
            end = torch.full((1, 1), self.absmax * share)
            self._known[share, bits] = self._round(end, bits, int((self.size > end).sum()))
        return self._known[share, bits]

    def own(self, bits: int) -> Fixed:
        """A range for each token, which ends at its largest magnitude."""
        return self._round(self.size[:, None], bits, 0)

    def _round(self, end: Tensor, bits: int, clipped: int) -> Fixed:
        scale, _ = affine.scale_and_zero_point(-end, end, f"int{bits}")
        off = affine.fake_quantize(self.x, scale, None, f"int{bits}") - self.x
        length = self.x.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        whole = float(off.norm() / length.norm())
        return Fixed(off.norm(dim=1) / length, whole, clipped)

    def draw(self, figure: Figure, reach: float, bits: int) -> str:
        here, own = self.fixed(reach, bits), self.own(bits)
        self._picture(figure, reach, here, own)
        tokens = len(self.x)
        return box(
            "info",
            f"<b>One range, ±{self.absmax * reach:.3g}, INT{bits}</b>: {here.clipped} of {tokens} tokens are clipped, "
            f"{here.spoiled} are off by more than {MUCH:.0%} of their size. A range for each token: {own.spoiled}.",
        )

    @styled
    def _picture(self, figure: Figure, reach: float, here: Fixed, own: Fixed) -> Figure:
        fig = new_figure(3.2, figure)
        ax = fig.subplots()
        size, one, each = (numbers(v.clamp(min=TINY)) for v in (self.size, 100 * here.error, 100 * own.error))
        ax.plot(size, one, "s", color=RED, markersize=2.5, label="one range for all")
        ax.plot(size, each, "o", color=BLUE, markersize=2.5, label="a range for each token")
        end = max(self.absmax * reach, TINY)
        ax.axvline(end, color=INK, linewidth=1, linestyle="--", label="where the one range ends")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set(xlabel="largest magnitude of the token (log)", ylabel="off by, % of its size (log)", ylim=(0.1, 200))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.grid(True, axis="y", linewidth=0.5)
        fig.legend(loc="outside lower center", ncols=3)
        return fig

    def rows(self) -> tuple[list[str], list[list[str]]]:
        tokens = len(self.x)
        lines = []
        for share in SHARES:
            here = self.fixed(share, 8)
            counts = [f"{here.clipped} of {tokens}", f"{here.spoiled} of {tokens}"]
            lines.append([f"{share:.0%} of the largest", *counts, f"{here.whole:.1%}"])
        own = self.own(8)
        lines.append(["each token's own", f"0 of {tokens}", f"{own.spoiled} of {tokens}", f"{own.whole:.1%}"])
        return ["INT8 range ends at", "tokens clipped", f"off by more than {MUCH:.0%}", "error of all together"], lines
