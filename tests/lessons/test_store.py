"""The progress file, and everything that can be wrong with it. The course goes on, and says so once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from canopyq import lessons
from canopyq.lessons import store as module
from canopyq.lessons.store import Store, default_path


def test_what_is_recorded_comes_back(progress_file: Path) -> None:
    Store(progress_file).record("quizzes", "memory", answer="c", right=True, tries=1)
    assert Store(progress_file).get("quizzes", "memory") == {"answer": "c", "right": True, "tries": 1}
    assert [f.name for f in progress_file.parent.iterdir()] == ["progress.json"], "the temporary file is gone"


def test_two_notebooks_do_not_overwrite_each_other(progress_file: Path) -> None:
    one, two = Store(progress_file), Store(progress_file)
    one.record("predictions", "02-a", guess=1.0)
    two.record("predictions", "02-b", guess=2.0)
    one.record("predictions", "02-c", guess=3.0)
    assert set(two.read()["predictions"]) == {"02-a", "02-b", "02-c"}


def test_an_empty_file_is_a_fresh_start(progress_file: Path) -> None:
    progress_file.touch()
    store = Store(progress_file)
    assert store.get("quizzes", "memory") == {} and store.notice() == ""


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", '"text"', "null", "\x00\x01", "[" * 100_000])
def test_a_damaged_file_is_kept_aside_and_said_once(progress_file: Path, text: str) -> None:
    progress_file.write_text(text)
    store = Store(progress_file)
    assert store.get("quizzes", "memory") == {}
    notice = store.notice()
    assert str(progress_file) in notice and ".bak-" in notice and "\n" not in notice
    assert store.notice() == ""
    [aside] = progress_file.parent.glob("progress.json.bak-*")
    assert aside.read_text() == text
    store.record("quizzes", "memory", answer="a", right=False, tries=1)
    assert Store(progress_file).get("quizzes", "memory")["answer"] == "a"


def test_wrong_types_are_left_out_and_the_rest_goes_on(progress_file: Path) -> None:
    data = {
        "quizzes": {
            "memory": {"answer": "c", "right": True, "tries": 1},
            "budget": {"answer": 3},
            "symmetry": {"tries": True},
        },
        "exercises": ["?"],
        "predictions": {"02-a": {"guess": float("nan")}, "02-b": {"guess": 2}},
    }
    progress_file.write_text(json.dumps(data))
    read = Store(progress_file).read()
    assert set(read["quizzes"]) == {"memory"} and read["exercises"] == {} and set(read["predictions"]) == {"02-b"}
    assert list(progress_file.parent.glob("*.bak-*"))


def test_bytes_that_are_no_text(progress_file: Path) -> None:
    progress_file.write_bytes(b"\xff\xfe\x00")
    assert Store(progress_file).get("quizzes", "memory") == {}


@pytest.mark.parametrize("where", ["a_file/progress.json", "a_folder"])
def test_a_file_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "a_folder").mkdir()
    store = Store(tmp_path / where)
    store.record("quizzes", "memory", answer="c", right=True, tries=1)
    assert store.get("quizzes", "memory")["answer"] == "c", "it lives on in memory"
    notice = store.notice()
    assert str(tmp_path / where) in notice and "CANOPYQ_PROGRESS" in notice and "\n" not in notice
    store.record("quizzes", "memory", answer="a", right=False, tries=2)
    assert store.notice() == ""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="file modes are POSIX")
def test_a_read_only_file_is_left_as_it_is(progress_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress_file.write_text("{}")
    progress_file.chmod(0o444)
    monkeypatch.setattr(module.os, "access", lambda *_: False)  # root may write everything
    store = Store(progress_file)
    store.record("quizzes", "memory", answer="c", right=True, tries=1)
    assert "read-only" in store.notice() and progress_file.read_text() == "{}"


def test_a_failed_write_leaves_the_old_file_whole(progress_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(progress_file)
    store.record("predictions", "02-a", guess=1.0)
    before = progress_file.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    store.record("predictions", "02-b", guess=2.0)
    assert progress_file.read_text() == before
    assert "no space left" in store.notice()
    assert [f.name for f in progress_file.parent.iterdir()] == ["progress.json"]


def test_the_reader_is_told_in_the_card(progress_file: Path) -> None:
    progress_file.write_text("{broken")
    quiz = lessons.quiz("memory")
    quiz.widget()
    assert "kept as" in quiz.widget().children[1].value
    assert "kept as" not in quiz.static_html()


def test_where_the_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CANOPYQ_PROGRESS")
    monkeypatch.chdir(tmp_path)
    assert default_path() == tmp_path / ".canopyq-progress.json"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_start_here.ipynb").touch()
    assert default_path() == tmp_path / "notebooks" / ".canopyq-progress.json"


def test_the_table() -> None:
    lessons.quiz("memory").answer("c")
    lessons.quiz("budget").answer("a")
    lessons.predict("02-error", "?").say(0.3)
    lines = repr(lessons.progress()).splitlines()
    assert len(lines) == 12
    assert lines[0].split() == "00 Start here quizzes 0 of 1 exercises 0 of 1 guesses -".split()
    assert lines[1].split() == "01 Precision formats quizzes 1 of 1 exercises 0 of 1 guesses -".split()
    assert lines[2].endswith("guesses  1")
