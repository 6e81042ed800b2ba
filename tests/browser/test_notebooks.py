"""Every notebook as a reader meets it: run it in JupyterLab, answer its quizzes, ask for a hint, come back later."""

from __future__ import annotations

import pytest

from canopyq.lessons.quiz import load
from canopyq.lessons.text import plain
from tests.browser.lab import ROOT

NOTEBOOKS = ["demo.ipynb", *sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))]

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_in_the_browser(name: str, open_notebook) -> None:
    lab = open_notebook(name)
    lab.run_all()
    assert lab.errors() == []
    quizzes = lab.quizzes()

    for quiz_id in quizzes:
        question = load(quiz_id)
        for choice in sorted(question.choices, key=lambda c: c.correct):  # the wrong ones first
            said = lab.answer(quiz_id, choice.letter)
            assert said.startswith("Right." if choice.correct else "Not this one.")
            assert plain(choice.reason) in said
        lab.photograph(f"quiz-{quiz_id}", lab.quiz(quiz_id))

    for number, card in enumerate(lab.page.locator(".canopyq-exercise").all(), 1):
        card.scroll_into_view_if_needed()
        card.locator(".canopyq-hint").first.click()
        card.locator(".canopyq-hints .canopyq-note").wait_for()
        assert "Hint 1." in card.locator(".canopyq-hints").inner_text()
        assert card.locator(".canopyq-solution").inner_text().strip() == ""
        lab.photograph(f"exercise-{number}", card)

    if not quizzes:
        return
    lab.restart_and_run()
    assert lab.errors() == []
    for quiz_id in quizzes:
        question = load(quiz_id)
        assert lab.chosen(quiz_id) == question.right.letter
        assert plain(question.right.reason) in lab.feedback(quiz_id)
