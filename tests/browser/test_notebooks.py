"""The course as a new learner walks it in JupyterLab: every guess and every choice of every quiz is made, every control
moved, every exercise answered with a classic mistake and then with its solution. The kernel computes what these need
(`needed.py`); what every cell shows is the business of `make check-notebooks`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from canopyq.lessons import exercises
from canopyq.lessons.quiz import load
from canopyq.lessons.text import plain
from tests.browser.course import COURSE, in_source
from tests.browser.lab import PROGRESS, LabPage

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.mark.parametrize("half", COURSE)
def test_walk_through_the_course(half: str, visit, workplace: Path) -> None:
    (workplace / PROGRESS).unlink(missing_ok=True)  # a reader who has answered nothing yet
    with visit(half) as lab:
        lab.run_all()
        assert lab.errors() == []
        assert lab.quizzes() == in_source(half, r'lessons\.quiz\("(.+?)"\)')
        for quiz in lab.quizzes():
            answer_every_choice(lab, quiz)
        assert len(lab.guesses()) == len(in_source(half, r"lessons\.predict\("))
        for card in lab.guesses():
            lab.guess(card, "0.25")
        assert lab.page.locator(".canopyq-explore").count() == len(in_source(half, r"lessons\.explore\."))
        move_every_control(lab)
        done = lab.exercises()
        assert set(done) >= set(in_source(half, r'lessons\.exercise\("(.+?)"\)'))
        for exercise in done:
            ask_for_a_hint(lab, exercise)
            solve(lab, exercise)
        assert lab.errors() == [] and lab.barriers() == []
    kept = json.loads((workplace / PROGRESS).read_text())
    assert [exercise for exercise in done if not kept["exercises"][exercise]["passed"]] == []


def test_answers_are_back_after_a_restart(visit, workplace: Path) -> None:
    (workplace / PROGRESS).unlink(missing_ok=True)
    with visit("restart.ipynb") as lab:
        lab.run_all()
        quizzes = lab.quizzes()
        assert len(quizzes) == 2
        for quiz in quizzes:
            lab.answer(quiz, load(quiz).right.letter)
        lab.save()
        lab.restart()
        say_they_are_not_connected(lab, quizzes)
        lab.reopen()
        say_they_are_not_connected(lab, quizzes)
        lab.run_all()
        assert lab.errors() == []
        for quiz in quizzes:
            assert lab.chosen(quiz) == load(quiz).right.letter
            assert plain(load(quiz).right.reason) in lab.feedback(quiz)


def say_they_are_not_connected(lab: LabPage, quizzes: list[str]) -> None:
    """Each card once, instead of a verdict that no kernel stands behind."""
    before = "at => [at, ...at.querySelectorAll('*')].map(x => getComputedStyle(x, '::before').content)"
    for quiz in quizzes:
        lab.page.locator(f".canopyq-quiz-{quiz}.jupyter-widgets-disconnected").wait_for()
        said = lab.quiz(quiz).evaluate(f"{before}.filter(x => x != 'none')")
        assert len(said) == 1 and "Not connected" in said[0]
        assert lab.chosen(quiz) and not lab.quiz(quiz).locator(".canopyq-feedback").is_visible()
    assert lab.quizzes() == quizzes and lab.errors() == []


def test_a_walk_fails_where_something_is_broken(visit, workplace: Path) -> None:
    """Every choice of this quiz is called right, its exercise takes no answer, its controls move nothing."""
    (workplace / PROGRESS).unlink(missing_ok=True)  # an answer from before would be shown and would not change
    with visit("broken.ipynb") as lab:
        lab.run_all()
        assert len(lab.errors()) == 1 and "ZeroDivisionError" in lab.errors()[0]
        for part in (
            lambda: answer_every_choice(lab, "memory"),
            lambda: move_every_control(lab),
            lambda: solve(lab, "00-bytes"),
        ):
            with pytest.raises(AssertionError):
                part()


def answer_every_choice(lab: LabPage, quiz: str) -> None:
    for choice in sorted(load(quiz).choices, key=lambda c: c.correct):  # the wrong ones first
        said = lab.answer(quiz, choice.letter)
        assert said.startswith("Right." if choice.correct else "Not this one.")
        assert plain(choice.reason) in said
    lab.photograph(f"quiz-{quiz}", lab.quiz(quiz))


def move_every_control(lab: LabPage) -> None:
    moved = {control: lab.move(control) for control in lab.controls()}
    for explorer in {explorer for explorer, _ in moved}:  # a choice may make no difference; not all of them
        assert any(changed for (number, _), changed in moved.items() if number == explorer)


def ask_for_a_hint(lab: LabPage, exercise: str) -> None:
    card = lab.exercise(exercise)
    card.scroll_into_view_if_needed()
    card.locator(".canopyq-hint").first.click()
    card.locator(".canopyq-hints .canopyq-note").wait_for()
    assert "Hint 1." in card.locator(".canopyq-hints").inner_text()
    assert card.locator(".canopyq-solution").inner_text().strip() == ""
    lab.photograph(f"exercise-{exercise}", card)


def solve(lab: LabPage, name: str) -> None:
    """The reader's own cell, once with a classic mistake and once with the solution."""
    exercise = exercises.load(name)
    if exercise.mistakes:
        said = lab.attempt(name, exercise.mistakes[0].source, exercise.function)
        assert plain(exercise.mistakes[0].name) in said
    assert lab.attempt(name, exercise.solution, exercise.function).startswith("Passed")
