"""The quizzes as written, and the card that asks them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from canopyq import lessons
from canopyq.errors import CanopyError
from canopyq.lessons.progress import LESSONS
from canopyq.lessons.quiz import Quiz
from canopyq.lessons.quizzes import Choice, Question, load, names

VIEW = "application/vnd.jupyter.widget-view+json"


def press(quiz: Quiz, letter: str | None) -> str:
    """Choose and check in the live card; returns the feedback."""
    quiz.widget()
    quiz._options.value = letter
    quiz.widget().children[3].click()
    return quiz._feedback.value


@pytest.mark.parametrize("name", names())
def test_every_quiz_is_whole(name: str) -> None:
    question = load(name)
    assert question.lesson in LESSONS
    assert [c.letter for c in question.choices] == list("abcdefgh")[: len(question.choices)]
    assert len(question.choices) >= 3 and sum(c.correct for c in question.choices) == 1
    reasons = [c.reason for c in question.choices]
    assert len(set(reasons)) == len(reasons) and all(len(r) > 40 for r in reasons)
    assert not any(mark in text for text in [question.question, *reasons] for mark in "{}")


def test_readers_answers_keep_their_place() -> None:
    """The progress file knows quizzes by these ids and choices by these letters."""
    ids = "budget memory symmetry weights activations kv-cache granularity storage outlier rounding speed choose"
    assert names() == [*ids.split(), "own-model"]
    assert "".join(load(name).right.letter for name in names()) == "ccacbcdcbbbbd"


def test_the_numbers_are_computed() -> None:
    memory, symmetry, budget = load("memory"), load("symmetry"), load("budget")
    assert [c.text for c in memory.choices] == ["14 GB", "7 GB", "3.5 GB", "1.75 GB"]
    assert "12.5% of FP32: 28 GB × 0.125 = 3.5 GB, 8 times smaller" in memory.right.reason
    assert "another 109 MB" in memory.right.reason
    assert "0.0102 to 0.0051" in symmetry.right.reason
    assert "3.61 GB of weights, scales included, and 2.15 GB of cache make 5.76 GB of 8" in budget.right.reason


def test_wrong_then_right() -> None:
    quiz = lessons.quiz("memory")
    for choice in load("memory").choices:
        feedback = press(quiz, choice.letter)
        assert ("Right." in feedback) == choice.correct == ("canopyq-good" in feedback)
        assert ("Not this one." in feedback) != choice.correct == ("canopyq-bad" not in feedback)


def test_nothing_chosen() -> None:
    assert "Choose an answer first" in press(lessons.quiz("memory"), None)


def test_a_verdict_goes_when_another_choice_is_made() -> None:
    quiz = lessons.quiz("memory")
    press(quiz, "c")
    quiz._options.value = "a"
    assert quiz._feedback.value == ""


def test_an_answer_is_kept_and_restored(progress_file: Path) -> None:
    press(lessons.quiz("memory"), "a")
    press(lessons.quiz("memory"), "c")
    assert json.loads(progress_file.read_text())["quizzes"]["memory"] == {"answer": "c", "right": True, "tries": 2}
    again = lessons.quiz("memory")
    again.widget()
    assert again._options.value == "c" and "Right." in again._feedback.value


def test_an_answer_of_an_older_edition_is_forgotten(progress_file: Path) -> None:
    progress_file.write_text('{"quizzes": {"memory": {"answer": "z", "right": true, "tries": 1}}}')
    quiz = lessons.quiz("memory")
    quiz.widget()
    assert quiz._options.value is None and quiz._feedback.value == ""


def test_answering_without_the_widget() -> None:
    quiz = lessons.quiz("memory")
    quiz.widget()
    feedback = quiz.answer("B")
    assert repr(feedback).startswith("Not this one. b: 7 GB is INT8")
    assert quiz._options.value == "b" and "Not this one." in quiz._feedback.value
    assert VIEW not in feedback._repr_mimebundle_()
    with pytest.raises(CanopyError, match="unknown choice for quiz memory 'x'"):
        quiz.answer("x")


def test_the_static_form_never_changes() -> None:
    first = lessons.quiz("symmetry")._repr_mimebundle_()
    press(lessons.quiz("symmetry"), "b")
    second = lessons.quiz("symmetry")._repr_mimebundle_()
    assert VIEW in first and VIEW in second
    assert first["text/html"] == second["text/html"] and first["text/plain"] == second["text/plain"]
    assert (
        first["text/plain"].startswith("Quiz symmetry: Weights usually lie around zero")
        and "(4 choices)" in first["text/plain"]
    )
    html = first["text/html"]
    assert html.count("<details") == html.count("</details>") == 4
    assert all(word in html for word in ("Right.", "Not this one.")) and "<script" not in html


def test_texts_are_escaped() -> None:
    choices = (Choice("a", "<i>1</i>", "<script>x</script>", correct=True), Choice("b", "2", "no & never"))
    quiz = Quiz(Question("x", "00", "<b>t</b>", "a <img src=x onerror=alert(1)> b", choices))
    live = quiz.widget().children[1].value + press(quiz, "a")
    for html in (quiz.static_html(), live):
        assert "<img" not in html and "<script" not in html and "<b>t</b>" not in html
    assert "no &amp; never" in quiz.static_html()


def test_an_unknown_quiz_names_the_nearest() -> None:
    with pytest.raises(CanopyError, match="did you mean 'memory'"):
        lessons.quiz("memroy")
