"""``explore.squeeze``: bits taken away from a real model, whose answer breaks, and is mended by more scales."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from ipywidgets import SelectionSlider, Widget
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from safetensors import safe_open

from canopyq.evaluate.stats import Share
from canopyq.memory import human
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tutor import path

from ..canvas import COLOURS, FAINT, INK, new_figure, styled
from ..html import box, buttons
from ..recorded import recorded
from ..text import inline
from .explorer import Explorer

MATRIX = "model.layers.3.mlp.up_proj.weight"
PATCH = slice(0, 32), slice(0, 64)
LONGEST = 48  # characters of an answer
SCALES = {"one scale": "tensor", "one per 128 weights": "g128", "one per 32": "g32"}


@cache
def _matrix() -> torch.Tensor:
    """One matrix of the tutor's, (out, in), in float32."""
    with safe_open(path() / "model.safetensors", "pt") as file:
        return file.get_tensor(MATRIX).float()


class Squeeze(Explorer):
    """The tutor with fewer and fewer bits a weight: some of its weights, an answer, and how many of all are right."""

    name = "squeeze"
    title = "Take bits away until it breaks, then mend it"

    def __init__(self, question: int = 4) -> None:
        self.record = recorded("opening")
        self.question = self.record["asked"][question]
        self.answers = {
            (row["bits"], row["granularity"]): row | {"answer": row["answers"][question]} for row in self.record["rows"]
        }
        self.right = self.answers[16, None]["answer"]

    def make_controls(self) -> dict[str, Widget]:
        bits = sorted({bits for bits, _ in self.answers}, reverse=True)
        options = [(f"{b} bits", b) for b in bits]
        return {
            "bits": SelectionSlider(options=options, value=16, description="a weight has"),
            "scale": buttons(SCALES),
        }

    def found(self, bits: int, scale: str) -> dict[str, Any]:
        """What was measured: bytes, right, answer. With 16 bits there is no scale."""
        return self.answers[bits, None if bits == 16 else scale]

    def draw(self, figure: Figure, bits: int, scale: str) -> str:
        self._picture(figure, bits, scale)
        row = self.found(bits, scale)
        fine = row["answer"] == self.right
        share = Share(row["right"], self.record["questions"])
        verdict = "right" if fine else "wrong"
        said = (
            f"<b>student:</b> {inline(self.question)}<br><b>tutor:</b> {inline(_cut(row['answer']))} <b>({verdict})</b>"
        )
        size = f"{human(row['bytes'])} on disk; {share.value:.0%} of {self.record['questions']} answers right."
        return box("good" if fine else "bad", f"{said}<br>{size}")

    @styled
    def _picture(self, figure: Figure, bits: int, scale: str) -> Figure:
        fig = new_figure(2.1, figure)
        left, right = fig.subplots(1, 2, width_ratios=[3, 2])
        weights = _matrix()
        limit = float(weights.abs().quantile(0.995))
        shown = weights if bits == 16 else quantize(weights, f"int{bits}", scale).dequantize()
        left.imshow(shown[PATCH], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        left.set(title=f"{shown[PATCH].unique().numel():,} different numbers in 2,048 weights", xticks=[], yticks=[])
        along = sorted({bits for bits, _ in self.answers})
        for colour, marker, (label, name) in zip(COLOURS, "osD", SCALES.items(), strict=False):
            shares = [self.found(b, name)["right"] / self.record["questions"] for b in along]
            strong = name == scale
            right.plot(range(len(along)), shares, color=colour if strong else FAINT, marker=marker, markersize=4,
                       linewidth=2 if strong else 1, label=label, zorder=2 + strong)  # fmt: skip
        here = self.found(bits, scale)["right"] / self.record["questions"]
        right.plot(along.index(bits), here, "o", color=INK, markersize=10, zorder=4)
        right.set_xticks(range(len(along)), along)
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        right.invert_xaxis()
        right.set(title="right answers", xlabel="bits a weight", ylim=(-0.05, 1.08))
        right.legend(loc="lower left")
        return fig

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for bits in sorted({bits for bits, _ in self.answers}, reverse=True):
            cells = []
            for scale in SCALES.values():
                row = self.found(bits, scale)
                wrong = "" if row["answer"] == self.right else "**wrong:** "
                share = row["right"] / self.record["questions"]
                cells.append(f"{wrong}{_cut(row['answer'])} ({share:.0%} of all right)")
            lines.append([f"{bits} bits", *cells])
        return ["", *SCALES], lines


def _cut(answer: str) -> str:
    return answer if len(answer) <= LONGEST else answer[:LONGEST] + "…"
