"""Exercise cards: ``ex = lessons.exercise("02-symmetric")``, then ``ex.check(my_function)``."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from weakref import WeakSet

from ipywidgets import HTML, Button, HBox, Layout, VBox

from canopyq import checks

from .diagnose import Finding, diagnose
from .exercises import load
from .html import Card, StaticCard, box, details, frame, heading, html_table, section
from .store import store
from .text import block, inline, plain, pre

TRIES = 3
_displayed: defaultdict[str, WeakSet[ExerciseCard]] = defaultdict(WeakSet)  # a check unlocks every card of its exercise
_BOX = {"passed": "good", "todo": "info"}


class ExerciseCard(Card):
    """The card of one exercise: what to write, hints, a check of the reader's own function, and the solution."""

    css = "canopyq-exercise"

    def __init__(self, name: str) -> None:
        self.spec = load(name)

    @property
    def stub(self) -> str:
        """The function to begin with."""
        return self.spec.stub

    @property
    def unlocked(self) -> bool:
        """Whether the solution may be seen: the check has passed, or has failed three times."""
        entry = store().get("exercises", self.spec.id)
        return entry.get("passed", False) or entry.get("tries", 0) >= TRIES

    def check(self, function: object) -> StaticCard:
        """Try ``function`` on the exercise's inputs and say what is right or wrong with it."""
        finding = self.judge(function)
        self._count(finding)
        locked = "" if finding.kind in ("passed", "todo") else self._outlook()
        kind = _BOX.get(finding.kind, "bad")
        html = box(kind, _finding_html(finding, kind) + locked + _notice())
        return StaticCard(html, f"Exercise {self.spec.id}: {_line(finding)}")

    def judge(self, answer: object) -> Finding:
        """What is to be said about the reader's answer."""
        return diagnose(self.spec, answer)

    def hint(self, number: int) -> StaticCard:
        """Hint 1, 2 or 3, where the buttons do not work."""
        text = self.spec.hints[checks.count("number", number, 1, 3) - 1]
        return StaticCard(box("note", f"<b>Hint {number}.</b> {inline(text)}"), f"Hint {number}. {plain(text)}")

    def solution(self) -> StaticCard:
        """The solution, once it is unlocked."""
        if not self.unlocked:
            return StaticCard(box("info", _LOCKED), "The solution is still locked.")
        store().record("exercises", self.spec.id, solution_seen=True)
        return StaticCard(pre(self.spec.solution), self.spec.solution)

    def _count(self, finding: Finding) -> None:
        if finding.kind == "passed":
            store().record("exercises", self.spec.id, passed=True)
        elif finding.kind != "todo" and not store().get("exercises", self.spec.id).get("passed"):
            store().record("exercises", self.spec.id, tried=True, passed=False)
        for shown in _displayed[self.spec.id]:
            shown._refresh()

    def _outlook(self) -> str:
        left = TRIES - store().get("exercises", self.spec.id).get("tries", 0)
        text = (
            "The solution is unlocked on the card above."
            if self.unlocked
            else f"Tries until the solution unlocks: {left}."
        )
        return f'<p style="margin:6px 0 0;font-size:13px;opacity:.85">{text}</p>'

    def widget(self) -> VBox:
        return self._live

    @cached_property
    def _live(self) -> VBox:
        spec = self.spec
        buttons = [Button(description=f"Hint {n}", layout=Layout(width="auto")) for n in (1, 2, 3)]
        for n, button in enumerate(buttons, 1):
            button.add_class("canopyq-hint")
            button.on_click(lambda _b, n=n: self._toggle_hint(n))
        self._open: list[int] = []
        self._hints = HTML("")
        self._hints.add_class("canopyq-hints")
        self._button = Button(layout=Layout(width="auto"))
        self._button.add_class("canopyq-solution-button")
        self._button.on_click(self._show_solution)
        self._solution = HTML("")
        self._solution.add_class("canopyq-solution")
        self._refresh()
        _displayed[spec.id].add(self)
        row = HBox([*buttons, self._button], layout=Layout(flex_flow="row wrap", overflow="visible"))
        return frame([HTML(self._head()), row, self._hints, self._solution], self.css, f"{self.css}-{spec.id}")

    def _refresh(self) -> None:
        self._button.disabled = not self.unlocked
        self._button.description = (
            "Solution" if self.unlocked else f"Solution (unlocks when the check passes, or after {TRIES} tries)"
        )

    def _toggle_hint(self, n: int) -> None:
        self._open = [i for i in self._open if i != n] if n in self._open else sorted([*self._open, n])
        self._hints.value = "".join(self.hint(i).static_html() for i in self._open)

    def _show_solution(self, _button: Button) -> None:
        self._solution.value = "" if self._solution.value else self.solution().static_html()

    def _head(self) -> str:
        spec = self.spec
        dots = "●" * spec.difficulty + "○" * (5 - spec.difficulty)
        aside = f"{spec.minutes} minutes, difficulty {dots}"
        return heading("Exercise", spec.title, aside) + f'<div style="font-size:14px">{block(spec.task)}</div>'

    def static_html(self) -> str:
        hints = "".join(details(f"Hint {n}", box("note", inline(text))) for n, text in enumerate(self.spec.hints, 1))
        return section(self._head() + hints + f'<p style="margin:6px 0 2px;font-size:13px;opacity:.8">{_LOCKED}</p>')

    def plain(self) -> str:
        spec = self.spec
        return f"Exercise {spec.id}: {spec.title} ({spec.minutes} minutes, difficulty {spec.difficulty} of 5)"


def exercise(name: str) -> ExerciseCard:
    """The card of the exercise called ``name``."""
    return ExerciseCard(name)


_LOCKED = f"The solution unlocks in a live notebook, when the check passes or after {TRIES} tries."


def _finding_html(finding: Finding, kind: str) -> str:
    words = {"mistake": "Not right yet. A classic: ", "passed": "", "todo": ""}.get(finding.kind, "")
    html = f"<b>{words}{inline(finding.title)}.</b> {block(finding.message)}"
    if finding.call:
        html += f'<div style="margin-top:6px">Seen with {inline("`" + finding.call + "`")}</div>'
    if finding.rows:
        given = any(row[1] for row in finding.rows)
        keep = (0, 1, 2, 3) if given else (0, 2, 3)
        head = ("where", "x there", "expected", "got")
        html += html_table([head[i] for i in keep], [[row[i] for i in keep] for row in finding.rows], kind)
    return html + "".join(f'<p style="margin:6px 0 0">{inline(note)}</p>' for note in finding.notes)


def _line(finding: Finding) -> str:
    match finding.kind:
        case "passed" | "todo":
            return finding.title.lower()
        case "mistake":
            return f"not right yet ({finding.title})"
        case _:
            return f"{finding.title.lower()}: {plain(finding.message)[:100]}"


def _notice() -> str:
    text = store().notice()
    return f'<p style="margin:6px 0 0">{inline(text)}</p>' if text else ""
