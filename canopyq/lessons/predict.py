"""Guess before you run: ``guess = lessons.predict(…)`` in one cell, ``guess.reveal(measured)`` in a later one."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from functools import cached_property
from weakref import WeakSet

from ipywidgets import HTML, Button, HBox, Layout, Text, VBox

from canopyq import checks
from canopyq.errors import CanopyError, shown

from .html import Card, box, details, frame, heading, section, verdict
from .store import store
from .text import block, inline, shorten

_displayed: defaultdict[str, WeakSet[Reveal]] = defaultdict(WeakSet)  # a guess opens every measurement of its question


class Predict(Card):
    """A question with a number to guess. The guess is kept with the reader's progress."""

    def __init__(self, name: str, question: str, unit: str = "") -> None:
        self.id, self.question = checks.text("name", name), checks.text("question", question)
        self.unit = checks.text("unit", unit)

    @property
    def guess(self) -> float | None:
        """The number guessed so far, or None."""
        return store().get("predictions", self.id).get("guess")

    def say(self, number: float) -> Predict:
        """Guess without the widget: ``guess.say(0.3)``."""
        guess = checks.number("number", _number(number))
        self._record(guess)
        if "_live" in self.__dict__:
            self._entry.value = f"{guess:g}"
        return self

    def reveal(self, value: float, fmt: str = ".3g") -> Reveal:
        """Hold the guess against the measured ``value``, written with the format ``fmt``."""
        return Reveal(self, _number(value), checks.text("fmt", fmt))

    def widget(self) -> VBox:
        return self._live

    @cached_property
    def _live(self) -> VBox:
        self._entry = Text(
            value="" if self.guess is None else f"{self.guess:g}",
            placeholder="a number",
            continuous_update=False,
            layout=Layout(width="130px"),
        )
        self._entry.add_class("canopyq-guess")
        keep = Button(description="Keep my guess", layout=Layout(width="auto"))
        self._answer = verdict("" if self.guess is None else self._noted(self.guess))
        self._entry.observe(lambda change: self._keep(change["new"]), "value")
        keep.on_click(lambda _button: self._keep(self._entry.value))
        row = HBox(
            [self._entry, HTML(inline(self.unit)), keep], layout=Layout(align_items="center", overflow="visible")
        )
        text = HTML(
            heading("Predict", "Before you run it") + f'<div style="font-size:14px">{block(self.question)}</div>'
        )
        return frame([text, row, self._answer], "canopyq-predict")

    def _keep(self, text: str) -> None:
        if not text.strip():
            return
        number = parse(text)
        if number is None:
            self._answer.value = box("bad", f"{inline(text)!s} does not read as a number. Write it as 0.5 or 3e-4.")
            return
        self._record(number)
        notice = store().notice()
        self._answer.value = self._noted(number) + (box("note", inline(notice)) if notice else "")

    def _record(self, guess: float) -> None:
        store().record("predictions", self.id, guess=guess)
        for reveal in _displayed[self.id]:
            reveal._refresh()

    def _noted(self, number: float) -> str:
        return box("info", f"Your guess: <b>{number:g}{_unit(self.unit)}</b>. Now run the cells below.")

    def static_html(self) -> str:
        return section(heading("Predict", "Before you run it") + block(self.question))

    def plain(self) -> str:
        return f"Predict {self.id}: {shorten(self.question)}"


class Reveal(Card):
    """The measured number; live, hidden until there is a guess, and then with the guess beside it."""

    def __init__(self, predict: Predict, value: float, fmt: str) -> None:
        self.predict, self.value, self.unit = predict, value, predict.unit
        self.measured = format(value, fmt)

    def widget(self) -> VBox:
        return self._live

    @cached_property
    def _live(self) -> VBox:
        self._answer = verdict()
        self._show = Button(description="Show it without a guess", layout=Layout(width="auto", align_self="flex-start"))
        self._show.on_click(lambda _button: self._open(f"Measured: <b>{self.measured}{_unit(self.unit)}</b>."))
        self._card = frame([self._answer, self._show], "canopyq-reveal", border="none")
        self._refresh()
        _displayed[self.predict.id].add(self)
        return self._card

    def _refresh(self) -> None:
        guess = self.predict.guess
        if guess is None:
            self._card.add_class("canopyq-locked")
            self._answer.value = box(
                "info", "Measured. Make your guess on the card above, and it opens, with what else the cells here show."
            )
            return
        self._open(
            f"You said <b>{guess:g}</b>; measured: <b>{self.measured}{_unit(self.unit)}</b>"
            f"{distance(guess, self.value)}"
        )

    def _open(self, body: str) -> None:
        self._answer.value = box("info", body)
        self._show.layout.display = "none"
        self._card.remove_class("canopyq-locked")

    def static_html(self) -> str:
        return details("Open when you have guessed", box("info", f"Measured: <b>{self.measured}{_unit(self.unit)}</b>"))

    def plain(self) -> str:
        return f"Measured: {self.measured}{' ' + self.unit if self.unit else ''}"


def predict(name: str, question: str, unit: str = "") -> Predict:
    """Ask for a number before it is measured; ``name`` starts with the lesson, as in ``"02-error"``."""
    return Predict(name, question, unit)


def _number(value: object) -> float:
    try:
        return float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise CanopyError(f"{shown(value)} is no number; give one such as 0.3") from None


def parse(text: str) -> float | None:
    """The number at the start of what was typed, or None: 0.5, 0,5, 1/2, 3e-4, 1,000 or 1 000."""
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    if fraction := re.fullmatch(r"(\d+)\s*/\s*([1-9]\d*)", text):
        return int(fraction[1]) / int(fraction[2])
    if "/" in text:
        return None
    if re.match(r"[-+]?[1-9]\d{0,2}(,\d{3})+(?![\d,])", text):
        text = text.replace(",", "")
    text = re.sub(r"(?<=\d)[ _](?=\d{3}\b)", "", text)
    if re.fullmatch(r"[^.,]*\d,\d+[^.,]*", text):
        text = text.replace(",", ".")
    match = re.match(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?(?![\w.,]*\d)", text)
    number = float(match.group()) if match else math.nan
    return number if math.isfinite(number) else None


def distance(guess: float, value: float) -> str:
    """How far off, in words: as a share of what was measured, or as a factor."""
    if guess == value or (value and abs(guess - value) <= 0.02 * abs(value)):
        return ". Spot on."
    if guess * value <= 0:
        return ""
    ratio = guess / value
    side = "high" if ratio > 1 else "low"
    by = f"{abs(ratio - 1):.0%}" if 0.5 < ratio < 2 else f"a factor of {max(ratio, 1 / ratio):.3g}"
    return f" ({by} too {side})"


def _unit(unit: str) -> str:
    return f" {inline(unit)}" if unit else ""
