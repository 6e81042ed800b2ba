"""``explore.speed``: bytes, arithmetic and time of a linear layer as the batch grows."""

from __future__ import annotations

from ipywidgets import SelectionSlider, Widget
from matplotlib.figure import Figure

from ..canvas import BLUE, INK, RED, SKY, new_figure, styled
from ..html import box, buttons
from ..roofline import H200, Machine, linear_work
from .explorer import Explorer

ROWS = tuple(2**i for i in range(13))
BITS = {"BF16": 16.0, "W8A16": 8.0, "W4A16 g128": 4.125}
INPUTS, OUTPUTS = 4096, 11008


class Speed(Explorer):
    """Tokens from 1 to 4096 and the weights' format: the time of the bytes, that of the arithmetic, the longer one."""

    name = "speed"
    title = "What sets the time of a layer?"

    def __init__(self, machine: Machine = H200) -> None:
        self.machine = machine

    def make_controls(self) -> dict[str, Widget]:
        return {
            "tokens": SelectionSlider(options=ROWS, value=1, description="tokens"),
            "weights": buttons(list(BITS), "W4A16 g128"),
        }

    def draw(self, figure: Figure, tokens: int, weights: str) -> str:
        self._picture(figure, tokens, weights)
        work = linear_work(tokens, INPUTS, OUTPUTS, BITS[weights])
        full = linear_work(tokens, INPUTS, OUTPUTS, BITS["BF16"])
        time, gain = 1e6 * work.seconds(self.machine), full.seconds(self.machine) / work.seconds(self.machine)
        return box(
            "info",
            f"<b>{tokens} token{'s' * (tokens > 1)}, {weights}</b>: {work.nbytes / 1e6:.1f} MB and "
            f"{work.operations / 1e9:.2f} billion operations, {work.intensity:.1f} for each byte. At least "
            f"{time:.1f} µs, set by {work.limit(self.machine)}; {gain:.2f} times as fast as BF16 could be.",
        )

    @styled
    def _picture(self, figure: Figure, tokens: int, weights: str) -> Figure:
        fig = new_figure(3.2, figure)
        ax = fig.subplots()
        works = [linear_work(rows, INPUTS, OUTPUTS, BITS[weights]) for rows in ROWS]
        moving = [1e6 * work.nbytes / self.machine.bytes_per_s for work in works]
        counting = [1e6 * work.operations / self.machine.operations_per_s for work in works]
        ax.plot(ROWS, moving, color=BLUE, linewidth=1.5, label="moving the bytes")
        ax.plot(ROWS, counting, color=RED, linewidth=1.5, label="the arithmetic")
        ax.plot(ROWS, [max(pair) for pair in zip(moving, counting, strict=True)], color=SKY, linewidth=6, alpha=0.5,
                label="the longer of the two", zorder=1)  # fmt: skip
        here = ROWS.index(tokens)
        ax.plot(tokens, max(moving[here], counting[here]), "o", color=INK, markersize=8)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_ylim(0.05, 2000)
        ax.set_xticks(ROWS[::2], [f"{rows:,}" for rows in ROWS[::2]])
        ax.minorticks_off()
        ax.set(xlabel="tokens multiplied together", ylabel="µs, at least")
        ax.grid(True, axis="y", linewidth=0.5)
        fig.legend(loc="outside lower center", ncols=3)
        return fig

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for tokens in (1, 16, 64, 256, 1024, 4096):
            times = [1e6 * linear_work(tokens, INPUTS, OUTPUTS, bits).seconds(self.machine) for bits in BITS.values()]
            lines.append([f"{tokens:,}", *(f"{time:.1f} µs" for time in times), f"{times[0] / times[-1]:.2f}"])
        return ["tokens", *BITS, "BF16 / W4A16"], lines
