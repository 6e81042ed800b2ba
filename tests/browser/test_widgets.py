"""The widgets themselves, on a small notebook that holds one of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from canopyq.lessons.quiz import load
from tests.browser.lab import PROGRESS, LabPage

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def demo(visit, workplace: Path) -> Iterator[LabPage]:
    """A notebook with one of everything, run once for all tests of this file by a reader who has done nothing yet."""
    (workplace / PROGRESS).unlink(missing_ok=True)
    with visit("widgets.ipynb") as lab:
        lab.run_all()
        if lab.screenshots:
            for i, output in enumerate(lab.page.locator(".jp-CodeCell .jp-Cell-outputWrapper").all()):
                if output.bounding_box() and output.bounding_box()["height"] > 10:
                    lab.photograph(f"cell-{i:02d}", output)
        yield lab


def test_a_quiz_can_be_answered_from_the_keyboard(demo) -> None:
    question = load("memory")
    quiz = demo.quiz("memory")
    quiz.scroll_into_view_if_needed()
    quiz.locator(".canopyq-choices button").first.focus()
    for _ in range(2):
        demo.page.keyboard.press("Tab")
    demo.page.keyboard.press("Enter")
    demo.page.wait_for_timeout(300)
    assert demo.chosen("memory") == question.choices[2].letter
    for _ in range(2):
        demo.page.keyboard.press("Tab")
    demo.page.keyboard.press("Enter")
    quiz.locator(".canopyq-feedback .canopyq-good").wait_for()
    assert demo.feedback("memory").startswith("Right.")


def test_a_guess_is_kept_and_held_against_the_measurement(demo) -> None:
    demo.page.locator(".canopyq-reveal", has_text="Make your guess").wait_for()
    told = demo.page.locator(".jp-OutputArea-output", has_text="half a step")
    assert told.count() == 2 and not any(output.is_visible() for output in told.all())
    entry = demo.page.locator(".canopyq-guess input")
    entry.scroll_into_view_if_needed()
    entry.fill("0,3")
    entry.press("Enter")
    demo.page.locator(".canopyq-predict", has_text="Your guess: 0.3 steps").wait_for()
    demo.page.locator(".canopyq-reveal", has_text="You said 0.3; measured: 0.5 steps").wait_for()
    assert all(output.is_visible() for output in told.all())
    demo.photograph("guess", demo.page.locator(".canopyq-predict"))


def test_a_slider_redraws_picture_and_line(demo) -> None:
    explorer = demo.page.locator(".canopyq-explore-bits")
    explorer.scroll_into_view_if_needed()
    before = explorer.locator("img").get_attribute("src")
    handle = explorer.locator(".noUi-handle").first
    handle.focus()
    handle.press("ArrowRight")
    explorer.locator(".canopyq-line", has_text="INT5, symmetric").wait_for()
    explorer.locator(".widget-toggle-button", has_text="asymmetric").click()
    explorer.locator(".canopyq-line", has_text="INT5, asymmetric").wait_for()
    assert explorer.locator("img").get_attribute("src") != before
    demo.photograph("slider", explorer)


def test_a_number_shows_its_bits(demo) -> None:
    explorer = demo.page.locator(".canopyq-explore-float-bits")
    explorer.scroll_into_view_if_needed()
    explorer.locator(".widget-toggle-button", has_text="-6.5").click()
    row = explorer.locator(".canopyq-format-fp8_e4m3")
    row.filter(has_text="-6.5").wait_for()
    assert "".join(row.locator("span").all_inner_texts()).replace(" ", "") == "11001101"
    demo.photograph("float-bits", explorer)


def test_the_solution_unlocks_after_three_tries(demo) -> None:
    card = demo.page.locator(".canopyq-exercise")
    button = card.locator(".canopyq-solution-button")
    assert button.is_disabled()
    assert "unlocks" in button.inner_text()
    wrong = demo.page.locator(".jp-CodeCell", has_text="round(-low / scale)")
    for left in (1, 0):  # the first wrong try came with running the notebook
        wrong.locator(".jp-InputArea-editor").click()
        demo.page.keyboard.press("Control+Enter")
        expected = f"Tries until the solution unlocks: {left}" if left else "The solution is unlocked"
        wrong.locator(".jp-OutputArea", has_text=expected).wait_for()
    button.click()
    card.locator(".canopyq-solution pre", has_text="qmin - low / scale").wait_for()
    demo.photograph("solution", card)


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_nothing_is_in_the_way_of_readers(demo, theme: str) -> None:
    demo.choose_theme(theme)
    assert demo.barriers() == []
    demo.photograph(theme.split()[-1].lower())


def test_nothing_is_said_outside_the_widgets(demo) -> None:
    assert demo.errors() == []
    assert demo.page.locator('[data-mime-type^="application/vnd.jupyter.std"]').count() == 0
