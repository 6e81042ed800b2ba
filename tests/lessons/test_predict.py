"""Guess, keep, reveal."""

from __future__ import annotations

import pytest

from canopyq import lessons
from canopyq.errors import CanopyError
from canopyq.lessons.predict import distance, parse

QUESTION = "How large can the rounding error get, in steps?"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.5", 0.5),
        ("0,5", 0.5),
        (" -3e-4 ", -3e-4),
        ("\N{MINUS SIGN}2", -2),
        ("14 GB", 14),
        ("50%", 50),
        (".5", 0.5),
        ("1 000", 1000),
        ("1,000", 1000),
        ("1,000,000", 1e6),
        ("1/2", 0.5),
    ],
)
def test_numbers_as_people_type_them(text: str, number: float) -> None:
    assert parse(text) == number


@pytest.mark.parametrize("text", ["", "half", "1.2.3", "1/0", "nan", "inf", "1e999"])
def test_what_is_no_number(text: str) -> None:
    assert parse(text) is None


def test_typing_a_guess_keeps_it() -> None:
    guess = lessons.predict("02-error", QUESTION, unit="steps")
    guess.widget()
    guess._entry.value = "a <b>lot</b>"
    assert "does not read as a number" in guess._answer.value and "<b>lot" not in guess._answer.value
    guess._entry.value = "0,3"
    assert guess.guess == 0.3 and "0.3 steps" in guess._answer.value
    again = lessons.predict("02-error", QUESTION, unit="steps")
    again.widget()
    assert again._entry.value == "0.3"


def test_reveal_shows_both_live_and_only_the_measurement_otherwise() -> None:
    guess = lessons.predict("02-error", QUESTION, unit="steps").say(0.3)
    reveal = guess.reveal(0.5)
    reveal.widget()
    assert "You said <b>0.3</b>; measured: <b>0.5 steps</b>" in reveal._answer.value
    assert repr(reveal) == "Measured: 0.5 steps" and "0.3" not in reveal.static_html()
    assert repr(guess.reveal(1 / 3, ".2g")) == "Measured: 0.33 steps"


def test_a_measurement_is_hidden_until_there_is_a_guess() -> None:
    guess = lessons.predict("02-error", QUESTION, unit="steps")
    reveal = guess.reveal(0.75)
    reveal.widget()
    assert "0.75" not in reveal._answer.value
    lessons.predict("02-error", QUESTION, unit="steps").say(0.5)  # on any card of the question
    assert "You said <b>0.5</b>; measured: <b>0.75 steps</b> (33% too low)" in reveal._answer.value


def test_a_measurement_is_shown_without_a_guess_if_wanted() -> None:
    reveal = lessons.predict("02-error", QUESTION).reveal(2)
    reveal.widget()
    reveal._show.click()
    assert "<b>2</b>" in reveal._answer.value


def test_the_static_form_does_not_know_the_guess() -> None:
    before = lessons.predict("02-error", QUESTION)._repr_mimebundle_()
    after = lessons.predict("02-error", QUESTION).say(7)._repr_mimebundle_()
    assert before["text/html"] == after["text/html"]
    assert before["text/plain"] == after["text/plain"] == f"Predict 02-error: {QUESTION}"


def test_distance_in_words() -> None:
    assert distance(0.5, 0.5) == ". Spot on."
    assert distance(0.6, 0.5) == " (20% too high)"
    assert distance(5, 9) == " (44% too low)"  # of what was measured
    assert distance(-0.9, -0.5) == " (80% too high)"
    assert distance(0.25, 0.5) == " (a factor of 2 too low)" and distance(1, 0.5) == " (a factor of 2 too high)"
    assert distance(1, 8) == " (a factor of 8 too low)"
    assert distance(-1, 8) == distance(0, 8) == ""


@pytest.mark.parametrize("given", [None, "much", [1], 1 + 2j, float("inf"), 10**400])
def test_what_cannot_be_guessed(given: object) -> None:
    guess = lessons.predict("02-error", QUESTION)
    with pytest.raises(CanopyError, match="is no (finite )?number"):
        guess.say(given)
    assert guess.guess is None
