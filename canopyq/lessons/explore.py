"""Sliders: one parameter to move, a picture and a line of numbers that follow.

A callback writes a PNG into ``Image.value`` and text into ``HTML.value``. It prints nothing and shows nothing, since
output from a callback would land in a cell that is long finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from ipywidgets import HTML, HBox, Image, Layout, VBox, Widget

from canopyq.evaluate import Comparison
from canopyq.tutor.questions import Question

from .canvas import detached, png
from .explore_answers import AnswersView
from .explore_bits import BitsView
from .explore_choose import TREE, ChooseView
from .explore_clip import ClipView
from .explore_context import ContextView
from .explore_float import FloatView
from .explore_groups import GroupsView
from .explore_outlier import OutlierView
from .explore_rounding import RoundingView
from .explore_speed import SpeedView
from .explore_static import StaticView
from .explore_turns import Grown, TurnsView
from .explore_words import WordsView
from .look import card, heading, section, table
from .shown import Shown
from .text import inline

__all__ = ["Explorer", "answers", "bits", "choose", "clip", "context", "float_bits", "groups", "outlier",
           "rounding", "speed", "static", "turns", "words"]  # fmt: skip


class Explorer(Shown):
    """Controls above, a picture and a line below.

    Args:
        name: a short id, used in ``text/plain`` and in CSS classes.
        controls: widgets with a ``value``, by name.
        draw: gets the controls' values and a figure; draws (or leaves the figure alone) and returns HTML.
        rows: header and rows of the table that stands for the explorer where nothing moves.
        about: HTML above that table.
    """

    def __init__(
        self,
        name: str,
        title: str,
        controls: Mapping[str, Widget],
        draw: Callable[..., str],
        rows: Callable[[], tuple[Sequence[str], list[Sequence[str]]]],
        about: str = "",
    ) -> None:
        self.name, self.title, self.controls, self._draw, self._rows = name, title, dict(controls), draw, rows
        self.about = about
        self.image = Image(format="png", layout=Layout(max_width="100%", width="768px", display="none"))
        self.line = HTML("")
        self.line.add_class("canopyq-line")

    def widget(self) -> VBox:
        return self._live

    @cached_property
    def _live(self) -> VBox:
        for control in self.controls.values():
            control.observe(self._changed, "value")
        self._changed()
        row = HBox(list(self.controls.values()), layout=Layout(flex_flow="row wrap", overflow="visible"))
        live = [HTML(heading("Explore", self.title)), row, self.line, self.image]
        return card(live, "canopyq-explore", f"canopyq-explore-{self.name}")

    def _changed(self, _change: object = None) -> None:
        figure = detached()
        self.line.value = self._draw(figure, **{name: control.value for name, control in self.controls.items()})
        if figure.axes:
            self.image.value = png(figure)
            self.image.layout.display = None

    def static_html(self) -> str:
        head, rows = self._rows()
        note = (
            '<p style="margin:4px 0;font-size:13px;opacity:.8">In a live notebook there is something to move here.</p>'
        )
        return section(heading("Explore", self.title) + self.about + table(head, rows) + note)

    def plain(self) -> str:
        return f"Explore {self.name}: {self.title} ({inline(', '.join(self.controls))})"


def bits(x: torch.Tensor, title: str = "How many bits does this tensor need?") -> Explorer:
    """Bits from 8 to 2 and the kind of range: the staircase or the histogram, the largest and the mean error."""
    view = BitsView(x)
    return Explorer("bits", title, view.controls(), view.draw, view.rows)


def float_bits(value: float = 0.1, title: str = "One number in five formats, bit by bit") -> Explorer:
    """Type a number and see its sign, exponent and mantissa in FP32, FP16, BF16 and both FP8 formats."""
    view = FloatView(value)
    return Explorer("float-bits", title, view.controls(), view.draw, view.rows)


def clip(x: torch.Tensor, title: str = "Where to cut the range") -> Explorer:
    """Move the end of the range: what clipping costs, what rounding costs, and their sum."""
    view = ClipView(x)
    return Explorer("clip", title, view.controls(), view.draw, view.rows)


def groups(x: torch.Tensor, title: str = "How many weights share a scale?") -> Explorer:
    """From one scale for all to one for eight neighbours: how closely they fit, what they cost, what they gain."""
    view = GroupsView(x)
    return Explorer("groups", title, view.controls(), view.draw, view.rows)


def answers(
    questions: Sequence[Question],
    runs: Mapping[int, tuple[Comparison, Sequence[str]]],
    title: str = "The same questions, with fewer and fewer bits",
) -> Explorer:
    """What quantized models answered, measured before; ``runs`` is for each number of bits its comparison with the
    original and its answers to ``questions``."""
    view = AnswersView(questions, runs)
    return Explorer("answers", title, view.controls(), view.draw, view.rows)


def outlier(x: torch.Tensor, title: str = "One value grows, the others pay") -> Explorer:
    """One large value beside ordinary ones: the step, how many codes are left to the others, their error."""
    view = OutlierView(x)
    return Explorer("outlier", title, view.controls(), view.draw, view.rows)


def context(title: str = "When does the cache outgrow the weights?") -> Explorer:
    """The length and number of chats, from 1k to 1M tokens: bytes of weights and cache in several precisions."""
    view = ContextView()
    return Explorer("context", title, view.controls(), view.draw, view.rows)


def turns(caches: Mapping[str, Grown], weights: int, title: str = "A chat, turn by turn") -> Explorer:
    """One chat turn by turn: the cache grows and the weights do not. ``caches`` holds (tokens, bytes) of each turn."""
    view = TurnsView(caches, weights)
    return Explorer("turns", title, view.controls(), view.draw, view.rows)


def choose(measurements: Sequence | None = None, title: str = "From needs to a recipe") -> Explorer:
    """The decision tree with its bytes, and the advisor's recommendation at the end of it."""
    view = ChooseView(measurements)
    return Explorer("choose", title, view.controls(), view.draw, view.rows, TREE)


def speed(title: str = "What sets the time of a layer?") -> Explorer:
    """Tokens from 1 to 4096 and the weights' format: the time of the bytes, that of the arithmetic, the longer one."""
    view = SpeedView()
    return Explorer("speed", title, view.controls(), view.draw, view.rows)


def words(x: torch.Tensor, title: str = "What is in a word?") -> Explorer:
    """The first row of a matrix, packed: which bits belong to which weight, in the word and in the file."""
    view = WordsView(x)
    return Explorer("words", title, view.controls(), view.draw, view.rows)


def static(x: torch.Tensor, title: str = "One range for all tokens") -> Explorer:
    """Where the one range of all tokens (tokens, features) ends: who is clipped, who vanishes, beside own ranges."""
    view = StaticView(x)
    return Explorer("static", title, view.controls(), view.draw, view.rows)


def rounding(first: float, second: float, title: str = "Two weights on a grid") -> Explorer:
    """Two weights whose inputs go together more or less: the nearest grid point, and the one nearest in the output."""
    view = RoundingView((first, second))
    return Explorer("rounding", title, view.controls(), view.draw, view.rows)
