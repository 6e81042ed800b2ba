"""``explore.answers``: the same questions, answered with fewer and fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ipywidgets import SelectionSlider, Widget
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from canopyq.evaluate.quality import Comparison
from canopyq.memory import human
from canopyq.tutor.exam import Question

from ..canvas import BLUE, INK, SKY, new_figure, styled
from ..html import box, html_table
from ..text import shorten
from .explorer import Explorer

LONGEST = 60  # characters of a question or an answer in a cell


class Answers(Explorer):
    """What quantized models answered, measured before; ``runs`` is for each number of bits its comparison with the
    original and its answers to ``questions``."""

    name = "answers"
    title = "The same questions, with fewer and fewer bits"

    def __init__(self, questions: Sequence[Question], runs: Mapping[int, tuple[Comparison, Sequence[str]]]) -> None:
        self.questions = list(questions)
        self.runs = {bits: runs[bits] for bits in sorted(runs, reverse=True)}

    def make_controls(self) -> dict[str, Widget]:
        names = [(f"{bits} bits", bits) for bits in self.runs]
        return {"bits": SelectionSlider(options=names, value=names[0][1], description="weights of")}

    def draw(self, figure: Figure, bits: int) -> str:
        self._picture(figure, bits)
        run, answers = self.runs[bits]
        pairs = zip(self.questions, answers, strict=True)
        lines = [(_cell(q.prompt), _cell(q.answer), _verdict(q, answer)) for q, answer in pairs]
        summary = (
            f"<b>{bits} bits</b>: the model takes {human(run.model.bytes)}; KL {run.kl:.2g} nats per token; "
            f"{run.model.accuracy} of {len(run.model.right)} answers right."
        )
        return box("info", summary) + html_table(("student", "right answer", f"tutor at {bits} bits"), lines)

    @styled
    def _picture(self, figure: Figure, bits: int) -> Figure:
        fig = new_figure(2.6, figure)
        left, right = fig.subplots(1, 2)
        along = list(self.runs)
        left.plot(along, [run.kl for run, _ in self.runs.values()], color=BLUE, marker="o", markersize=4)
        left.plot(bits, self.runs[bits][0].kl, "o", color=INK, markersize=9)
        left.set_yscale("log")
        left.yaxis.set_minor_locator(NullLocator())
        left.set(xlabel="bits", ylabel="KL, nats per token (log)")
        shares = [run.model.accuracy for run, _ in self.runs.values()]
        low, high = zip(*(share.interval for share in shares), strict=True)
        right.vlines(along, low, high, color=SKY, linewidth=4)
        right.plot(along, [share.value for share in shares], color=BLUE, marker="o", markersize=4)
        right.plot(bits, self.runs[bits][0].model.accuracy.value, "o", color=INK, markersize=9)
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        right.set(xlabel="bits", ylabel="right answers")
        for ax in (left, right):
            ax.set_xticks(along)
            ax.invert_xaxis()
            ax.grid(True, axis="y", linewidth=0.5)
        return fig

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for i, question in enumerate(self.questions):
            answers = [_verdict(question, answers[i]) for _, answers in self.runs.values()]
            lines.append([_cell(question.prompt), *answers])
        return ["student", *(f"{bits} bits" for bits in self.runs)], lines


def _cell(text: str) -> str:
    """One line, its marks taken as plain text."""
    return shorten(text.replace("*", "×").replace("`", "'"), LONGEST)


def _verdict(question: Question, answer: str) -> str:
    return _cell(answer) if answer == question.answer else f"**wrong:** {_cell(answer)}"
