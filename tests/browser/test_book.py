"""The book in a browser that reaches nothing but its files: every quiz and every guess answers without a kernel."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from canopyq.lessons import quizzes
from tests.browser.lab import ROOT, barriers

LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
MOST = 20e6  # bytes of the whole book


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("book")
    command = [sys.executable, "tools/book.py", "--out", str(out), "--record", "01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def page(browser, book: Path) -> Iterator[object]:
    page = browser.new_page()
    page.wanted, page.errors = [], []
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or page.wanted.append(r.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    page.close()


@pytest.mark.parametrize("lesson", LESSONS)
def test_cards_answer(page, book: Path, lesson: str) -> None:
    page.goto((book / "lessons" / f"{lesson}.html").as_uri())
    forms = page.locator(".cq-quiz").all()
    assert len(forms) == 1
    pictures = page.locator("article img:not(.cq-picture)").all()
    assert not [alt for picture in pictures if not (alt := picture.get_attribute("alt")) or alt.endswith(".png")]
    for form in forms:
        quiz = quizzes.load(form.get_attribute("data-name"))
        verdict = form.locator(".cq-verdict")
        form.locator("button").click()
        assert verdict.locator(".cq-info").count() == 1, "nothing was chosen"
        for choice in quiz.choices:
            form.locator(f'input[value="{choice.letter}"]').check()
            assert not verdict.inner_text().strip(), "what was said is of another choice"
            form.locator("button").click()
            assert verdict.locator(".cq-good").count() == choice.correct
            assert verdict.locator(".cq-bad").count() == (not choice.correct)
    measured = page.locator(".cq-measured")
    guesses = page.locator(".cq-guess").all()
    assert guesses and measured.count() >= len(guesses)
    assert not any("Measured:" in place.inner_text() for place in measured.all()), "shown before the guess"
    for form in guesses:
        form.locator("input").fill("1/4")
        form.locator("button").click()
        place = page.locator(f'.cq-measured[data-name="{form.get_attribute("data-name")}"]').first
        assert re.match(r"You said 0\.25; measured: ", place.inner_text())
    page.reload()
    assert barriers(page) == []
    assert page.locator(".cq-quiz input:checked").count() == 1, "answers are kept"
    assert page.locator(".cq-measured").first.inner_text().startswith("You said 0.25")
    assert page.wanted == [] and page.errors == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [("0,5", "Spot on"), ("0.25", "a factor of 2 too low"), ("0.55", "10% too high"), ("a lot", "does not read")],
)
def test_a_guess_is_held_against_what_was_measured(page, book: Path, typed: str, said: str) -> None:
    """Lesson 02 measures that rounding is at most half a step off."""
    page.goto((book / "lessons" / "02_symmetric_and_asymmetric.html").as_uri())
    form = page.locator('.cq-guess[data-name="02-error"]')
    form.locator("input").fill(typed)
    form.locator("button").click()
    answer = form if "read" in said else page.locator('.cq-measured[data-name="02-error"]')
    assert said in answer.inner_text()


def test_what_an_explorer_drew_is_there_to_move_through(page, book: Path) -> None:
    page.goto((book / "lessons" / "01_precision_formats.html").as_uri())
    card = page.locator(".cq-explore")
    shown = []
    for place in range(card.locator("option").count()):
        card.locator("select").select_option(str(place))
        shown.append(card.locator(".cq-line").inner_text())
    assert len(set(shown)) == len(shown) > 3 and all(shown)
    assert page.errors == []


def test_every_page_is_small_and_links_lead_somewhere(page, book: Path) -> None:
    files = [path for path in book.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST
    for path in book.rglob("*.html"):
        page.goto(path.as_uri())
        for link in page.locator("main a[href], article a[href]").evaluate_all("all => all.map(a => a.href)"):
            if link.startswith("file:"):
                target = Path(link.removeprefix("file://").split("#")[0].split("?")[0])
                assert target.is_file(), f"{path.name} links to {target}"


def test_search_finds_a_word_of_a_lesson(page, book: Path) -> None:
    page.goto((book / "search.html").as_uri() + "?q=cholesky")
    page.locator("#search-results li").first.wait_for()
    assert "09" in page.locator("#search-results").inner_text()


def test_the_reference_has_every_public_function(page, book: Path) -> None:
    import canopyq as cq

    page.goto((book / "reference.html").as_uri())
    named = set(page.locator("dt.sig").evaluate_all("all => all.map(it => it.id)"))
    assert {f"canopyq.{name}" for name in cq.__all__ if callable(getattr(cq, name))} <= named
