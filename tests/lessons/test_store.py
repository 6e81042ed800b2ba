"""The progress file, and everything that can be wrong with it. The course goes on, and says so once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from canopyq import disk, lessons
from canopyq.lessons.progress import LESSONS
from canopyq.lessons.store import Store, default_path, store

ROOT = Path(__file__).resolve().parents[2]


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
    assert aside.read_text() == text and aside.name in notice
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


def test_bytes_that_are_no_text_are_kept_under_a_visible_name(tmp_path: Path) -> None:
    hidden, damaged = tmp_path / ".progress.json", b"\xff\xfe\x00 one"
    for content in (damaged, b"\x80 two"):  # in the same second, too
        hidden.write_bytes(content)
        Store(hidden).record("predictions", "02-a", guess=1.0)
    kept = list(tmp_path.glob("progress.json.bak-*"))
    assert {file.read_bytes() for file in kept} == {damaged, b"\x80 two"} and len(kept) == 2
    assert Store(hidden).get("predictions", "02-a") == {"guess": 1.0}


def test_what_this_version_does_not_know_stays(progress_file: Path) -> None:
    newer = {
        "version": 7,
        "badges": [{"name": "first"}],
        "quizzes": {"memory": {"answer": "a", "tries": 2, "seconds": 8.5}, "budget": {"answer": {"letters": ["a"]}}},
        "predictions": {"02-a": {"guess": 1, "unit": "%"}},
    }
    progress_file.write_text(json.dumps(newer))
    store = Store(progress_file)
    assert store.read()["quizzes"] == {"memory": {"answer": "a", "tries": 2}}
    store.record("quizzes", "memory", tried=True, answer="c", right=True)
    newer["quizzes"]["memory"] |= {"answer": "c", "tries": 3, "right": True}
    assert json.loads(progress_file.read_text()) == newer | {"exercises": {}}
    assert store.notice() == "" and not list(progress_file.parent.glob("*.bak-*"))


# Without torch, which `import canopyq` brings and no line of this needs: 0.1 s a process.
WRITER = """
import sys, types
for name in ("canopyq", "canopyq.lessons"):
    package = types.ModuleType(name)
    package.__path__ = [f"{sys.argv[1]}/{name.replace('.', '/')}"]
    sys.modules[name] = package
from pathlib import Path
from canopyq import disk
from canopyq.lessons.store import Store
if sys.argv[4] == "lock file":
    disk.fcntl = None
disk.PATIENCE = 60
store = Store(Path(sys.argv[2]))
for number in range(50):
    store.record("predictions", f"{sys.argv[3]}-{number}", guess=number)
    store.record("quizzes", "all", tried=True)
assert store.notice() == "", store.notice()
"""


@pytest.mark.parametrize("kind", ["system", "lock file"])
def test_four_writers_at_once_lose_nothing(progress_file: Path, kind: str) -> None:
    arguments = [sys.executable, "-c", WRITER, str(ROOT), str(progress_file)]
    writers = [subprocess.Popen([*arguments, str(number), kind]) for number in range(4)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0, 0]
    read = Store(progress_file).read()
    assert set(read["predictions"]) == {f"{writer}-{number}" for writer in range(4) for number in range(50)}
    assert read["quizzes"]["all"]["tries"] == 200
    assert [file.name for file in progress_file.parent.iterdir()] == ["progress.json"]


def test_a_link_stays_one_and_a_mode_stays(tmp_path: Path, progress_file: Path) -> None:
    real = tmp_path / "elsewhere" / "mine.json"
    real.parent.mkdir()
    real.write_text("{}")
    real.chmod(0o640)
    progress_file.symlink_to(real)
    Store(progress_file).record("predictions", "02-a", guess=1.0)
    assert progress_file.is_symlink() and json.loads(real.read_text())["predictions"] == {"02-a": {"guess": 1.0}}
    assert real.stat().st_mode & 0o777 == 0o640


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        kind = path.stat().st_mode
        store = Store(path)
        store.record("predictions", "02-a", guess=1.0)
        assert store.get("predictions", "02-a") == {"guess": 1.0} and str(path) in store.notice()
        assert path.stat().st_mode == kind


def test_what_could_not_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 0)
    store = Store(tmp_path / "progress.json")
    with disk.locked(store.path):
        store.record("quizzes", "memory", tried=True, answer="a")
        store.record("quizzes", "memory", tried=True, answer="c")
    assert "lock" in store.notice() and not store.path.exists()
    store.record("predictions", "02-a", guess=1.0)
    assert Store(store.path).get("quizzes", "memory") == {"answer": "c", "tries": 2}


def test_one_click_reads_the_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(Store, "_parse", lambda self, _read=Store._parse, **how: reads.append(1) or _read(self, **how))
    lessons.quiz("memory").answer("c")
    assert len(reads) == 1


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
    monkeypatch.setattr(disk.os, "access", lambda *_: False)  # root may write everything
    store = Store(progress_file)
    store.record("quizzes", "memory", answer="c", right=True, tries=1)
    assert "read-only" in store.notice() and progress_file.read_text() == "{}"


def test_a_failed_write_leaves_the_old_file_whole(progress_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(progress_file)
    store.record("predictions", "02-a", guess=1.0)
    before = progress_file.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "replace", full)
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
    (tmp_path / "notebooks" / "more").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks" / "more")
    assert default_path() == tmp_path / "notebooks" / ".canopyq-progress.json"


def test_the_table() -> None:
    lessons.quiz("memory").answer("c")
    lessons.quiz("budget").answer("a")
    lessons.predict("02-error", "?").say(0.3)
    lines = repr(lessons.progress()).splitlines()
    assert len(lines) == len(LESSONS)
    assert lines[0].split() == "00 Start here quizzes 0 of 1 exercises 0 of 1 guesses -".split()
    assert lines[1].split() == "01 Precision formats quizzes 1 of 1 exercises 0 of 1 guesses -".split()
    assert lines[2].endswith("guesses  1")


def test_the_strip_counts_what_is_right_and_passed() -> None:
    assert "01 0 of 2" in repr(lessons.strip())
    store().record("quizzes", "memory", answer="c", right=True)
    assert "01 1 of 2" in repr(lessons.strip()) and ">01 1/2<" in lessons.strip().static_html()
    store().record("exercises", "01-round-to-format", passed=True)
    assert "01 done" in repr(lessons.strip()) and ">01 2/2<" in lessons.strip().static_html()
