"""``explore.choose``: a decision tree that counts bytes at every fork."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ipywidgets import SelectionSlider, Widget
from matplotlib.figure import Figure

from canopyq.advisor import ROWS, Measurement, Needs, Option, advise, recorded
from canopyq.errors import CanopyError
from canopyq.memory import human

from ..html import box, buttons
from .explorer import Explorer

MODELS = ("qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b", "llama-2-7b", "mistral-7b", "llama-3.1-8b", "llama-2-13b",
          "qwen2.5-32b", "llama-3.1-70b")  # fmt: skip
CONTEXTS = {"none": 0, "4k": 4096, "32k": 32768, "128k": 131072}
BUDGETS = (4e9, 6e9, 8e9, 16e9, 24e9)
MEMORY = {f"{gb} GB": float(gb) for gb in (1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)}
SERVED_BY = {"vLLM": "vllm", "canopyq": None}
SMALL = 0.1  # a cache below this share of the memory is not worth a thought
TREE = """\
<ol style="margin:4px 0;padding-left:22px">
<li><b>Do the model and its cache fit in 16 bits?</b> Yes: nothing forces you to quantize; go on for speed. No: go
on.</li>
<li><b>What matters most?</b> Accuracy: 8-bit weights, <code>w8a16</code>. A middle ground: <code>w4a16-g128</code>.
Size: <code>w4a16-g256</code>.</li>
<li><b>Does that fit, and does the server run it?</b> Yes: take it. No: take the best of what does; if nothing does, one
of the needs has to give.</li>
<li><b>Is the cache more than a tenth of it?</b> Yes: quantize the cache too. No: leave it in 16 bits.</li>
</ol>"""


class Choose(Explorer):
    """The decision tree with its bytes, and the advisor's recommendation at the end of it."""

    name = "choose"
    title = "From needs to a recipe"
    about = TREE

    def __init__(self, measurements: Sequence[Measurement] | None = None) -> None:
        self.known = list(measurements) if measurements is not None else recorded()

    def make_controls(self) -> dict[str, Widget]:
        return {
            "priority": buttons([priority for _, priority, _ in ROWS if priority], "balanced"),
            "server": buttons(list(SERVED_BY), "vLLM"),
            "model": SelectionSlider(options=MODELS, value="mistral-7b", description="model"),
            "memory": SelectionSlider(options=MEMORY, value=8.0, description="memory"),
            "context": SelectionSlider(options=CONTEXTS, value=32768, description="context"),
        }

    def draw(self, figure: Figure, priority: str, server: str, model: str, memory: float, context: int) -> str:
        memory = round(memory * 1e9)
        needs = Needs.parse(model, memory=memory, context=context, priority=priority, server=SERVED_BY[server])
        steps = "".join(f"<li>{question} {answer}</li>" for question, answer in self.steps(needs))
        return f'<ol style="margin:4px 0;padding-left:22px;line-height:1.6">{steps}</ol>{self.leaf(needs)}'

    def steps(self, needs: Needs) -> list[tuple[str, str]]:
        """Each fork of the tree and the way that these needs take there, as HTML."""
        plain = self.option("bf16", needs)
        recipe = next(recipe for _, priority, recipe in ROWS if priority == needs.priority)
        row = self.option(recipe, needs)
        said = [(f"<b>In 16 bits?</b> {_sum(plain)}", _fits(plain, needs))]
        said.append(("<b>What matters most?</b>", f"{needs.priority}: <code>{recipe}</code>"))
        served = "" if row.refused is None else f"; but {html.escape(row.refused)}"
        said.append((f"<b>Does that fit, and is it served?</b> {_sum(row)}", _fits(row, needs) + served))
        share = row.cache / row.total
        large = f"{share:.0%} of it: " + ("<b>yes</b>, quantize it" if share > SMALL else "<b>no</b>, leave it")
        said.append(("<b>Is the cache more than a tenth?</b>", large))
        return said

    def leaf(self, needs: Needs) -> str:
        """The recommendation, or what has to give."""
        try:
            found = advise(needs, measurements=self.known)
        except CanopyError as error:
            return box("bad", f"<b>Nothing fits.</b> {html.escape(str(error).split('). ', 1)[-1])}")
        best = found.best
        measured = f"{best.measured} ({best.measured.source})" if best.here else "not measured on this model"
        lines = [
            f"<b>{best.name}</b>: {human(best.total)}, {human(needs.memory - best.total)} to spare; quality: "
            f"{html.escape(measured)}"
        ]
        return box("good", "<br>".join([*lines, *(html.escape(line) for line in found.table)]))

    def option(self, name: str, needs: Needs) -> Option:
        """A recipe with a 16-bit cache on these needs, whatever it was measured to be."""
        known = next((m for m in self.known if m.recipe == name), Measurement(name, 0.0, 1, 1))
        return Option.of(known, needs)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        priorities = [priority for _, priority, _ in ROWS if priority]
        lines = []
        for budget in BUDGETS:
            cells = []
            for priority in priorities:
                needs = Needs.parse("mistral-7b", memory=budget, context="32k", priority=priority, server="vllm")
                try:
                    cells.append(advise(needs, measurements=self.known).best.name)
                except CanopyError:
                    cells.append("nothing fits")
            lines.append([f"mistral-7b, 32k tokens, {human(budget)}, vLLM", *cells])
        return ["needs", *priorities], lines


def _sum(option: Option) -> str:
    cache = f" + cache {human(option.cache)}" if option.cache else ""
    return f"{human(option.weights.total)}{cache} = {human(option.total)}."


def _fits(option: Option, needs: Needs) -> str:
    return "<b>Yes</b>" if option.total <= needs.memory else f"<b>No</b>, {human(option.total - needs.memory)} too many"
