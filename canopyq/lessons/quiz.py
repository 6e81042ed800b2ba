"""Quizzes: ``lessons.quiz("memory")`` as the last line of a cell. The questions live in ``quizzes/``."""

from __future__ import annotations

from functools import cached_property

from ipywidgets import HTML, Button, Layout, ToggleButtons, VBox

from .html import Card, StaticCard, box, details, frame, heading, section, verdict
from .quizzes import Choice, Question, load
from .store import store
from .text import block, inline, plain, shorten


class Quiz(Card):
    """A question to answer in the notebook, as often as one likes; the last answer is kept."""

    def __init__(self, question: Question) -> None:
        self.question = question

    def answer(self, letter: str) -> StaticCard:
        """Answer without the widget: ``lessons.quiz("memory").answer("b")``."""
        choice = self.question.choice(letter)
        html = self._record(choice)
        if "_live" in self.__dict__:
            self._options.value, self._feedback.value = choice.letter, html
        return StaticCard(_feedback(choice), f"{_verdict(choice)} {choice.letter}: {plain(choice.reason)}")

    def widget(self) -> VBox:
        return self._live

    @cached_property
    def _live(self) -> VBox:
        q = self.question
        kept = store().get("quizzes", q.id).get("answer")
        chosen = kept if kept in [c.letter for c in q.choices] else None
        # Buttons, not radio buttons: JupyterLab keeps the arrow keys for itself; Tab and Enter reach every button.
        self._options = ToggleButtons(
            options=[(f"{c.letter}.  {plain(c.text)}", c.letter) for c in q.choices],
            value=chosen,
            layout=Layout(width="auto", margin="0 0 4px"),
            style={"button_width": "100%"},
        )
        self._options.add_class("canopyq-choices")
        check = Button(description="Check", button_style="primary", tooltip="Check the chosen answer")
        check.add_class("canopyq-check")
        check.on_click(self._on_check)
        self._feedback = verdict(_feedback(q.choice(chosen)) if chosen else "")
        self._feedback.add_class("canopyq-feedback")
        self._options.observe(self._on_choose, "value")
        text = HTML(heading("Quiz", q.title) + f'<div style="font-size:14px">{block(q.question)}</div>' + _notice())
        return frame([text, self._options, check, self._feedback], "canopyq-quiz", f"canopyq-quiz-{q.id}")

    def _on_choose(self, _change: object) -> None:
        """What was said is of another choice."""
        self._feedback.value = ""

    def _on_check(self, _button: Button) -> None:
        if self._options.value is None:
            self._feedback.value = box("info", "Choose an answer first.")
            return
        self._feedback.value = self._record(self.question.choice(self._options.value))

    def _record(self, choice: Choice) -> str:
        """Keep the answer; returns its feedback."""
        store().record("quizzes", self.question.id, tried=True, answer=choice.letter, right=choice.correct)
        return _feedback(choice) + _notice()

    def static_html(self) -> str:
        q = self.question
        parts = [
            details(f"{c.letter}. {inline(c.text)}", f'<div style="margin:2px 0 6px 18px">{_feedback(c)}</div>')
            for c in q.choices
        ]
        hint = (
            '<p style="margin:4px 0;opacity:.8;font-size:13px">Open a choice to see whether it is right, and why.</p>'
        )
        return section(heading("Quiz", q.title) + block(q.question) + "".join(parts) + hint)

    def plain(self) -> str:
        return f"Quiz {self.question.id}: {shorten(self.question.question)} ({len(self.question.choices)} choices)"


def quiz(name: str) -> Quiz:
    """The quiz called ``name``; make it the last expression of a cell."""
    return Quiz(load(name))


def _verdict(choice: Choice) -> str:
    return "Right." if choice.correct else "Not this one."


def _feedback(choice: Choice) -> str:
    return box("good" if choice.correct else "bad", f"<b>{_verdict(choice)}</b> {inline(choice.reason)}")


def _notice() -> str:
    text = store().notice()
    return box("note", inline(text)) if text else ""
