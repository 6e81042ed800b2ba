"""The wheel, built, and used outside of the checkout: it carries the course."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from canopyq.cli import app

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("canopyq", "notebooks", "jupyter", "benchmarks", "docs", "pyproject.toml", "setup.py", "MANIFEST.in",
         "README.md", "LICENSE")  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to which the wheel was installed. What it depends on is that of the tests."""
    place = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", "*.png")
    (place / "source").mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, place / "source" / part, ignore=unwanted)
        else:
            shutil.copyfile(ROOT / part, place / "source" / part)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    quiet = {"check": True, "capture_output": True, "text": True}
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, place / "source"], **quiet)
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "site", *place.glob("*.whl")], **quiet)
    return place / "site"


def outside(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CANOPYQ")}
    return subprocess.run(
        [sys.executable, *command], cwd=installed.parent, env=environment | {"PYTHONPATH": str(installed)},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_wheel_carries_the_course(installed: Path) -> None:
    done = outside(installed, "-m", "canopyq", "course", "lessons", "--no-lab")
    assert done.returncode == 0, done.stderr
    lessons = installed.parent / "lessons" / "notebooks"
    all_of = {file.relative_to(ROOT / "notebooks") for file in (ROOT / "notebooks").rglob("*.ipynb")}
    all_of = {file for file in all_of if ".ipynb_checkpoints" not in file.parts}
    assert {file.relative_to(lessons) for file in lessons.rglob("*.ipynb")} == all_of
    assert (lessons.parent / "docs" / "when-it-goes-wrong.md").is_file(), "lessons lead to it"
    code = (
        "import canopyq as cq; from pathlib import Path; print(Path(cq.__file__).parents[1]);"
        "print(len(cq.lessons.recorded('linear_w4a16')), len(cq.tutor.questions(3)))"
    )
    done = outside(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    where, counts = done.stdout.splitlines()
    assert Path(where) == installed and [int(count) > 0 for count in counts.split()] == [True, True]
    assert (installed / "canopyq" / "py.typed").is_file()


def test_a_folder_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str):
        return CliRunner().invoke(app, ["course", *arguments])

    assert run(str(tmp_path / "mine"), "--no-lab").exit_code == 0
    lesson = tmp_path / "mine" / "notebooks" / "00_start_here.ipynb"
    lesson.write_text("my notes", encoding="utf-8")
    assert run(str(tmp_path / "mine"), "--no-lab").exit_code == 0 and lesson.read_text(encoding="utf-8") == "my notes"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("", encoding="utf-8")
    done = run(str(tmp_path / "other"), "--no-lab")
    assert done.exit_code and str(tmp_path / "other") in str(done.exception)
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_copy_that_was_cut_short_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename_one(self: Path, target: Path, real=Path.rename) -> Path:
        if list(tmp_path.glob("docs")):
            raise OSError("no power")
        return real(self, target)

    before = tmp_path.stat().st_ino  # a shell may stand in it
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_one)
        assert CliRunner().invoke(app, ["course", str(tmp_path), "--no-lab"]).exit_code
    assert not (tmp_path / "notebooks").exists()
    assert CliRunner().invoke(app, ["course", str(tmp_path), "--no-lab"]).exit_code == 0
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "docs", "jupyter", "notebooks"}
    assert (tmp_path / "notebooks" / "00_start_here.ipynb").is_file() and tmp_path.stat().st_ino == before


LAB = """import json, os, pathlib, signal, sys, time
said = pathlib.Path(os.environ["SAID"])
def stop(*_):
    time.sleep(0.6)
    said.with_name("saved").write_text("")
    sys.exit(7)
signal.signal(signal.SIGINT, stop)
said.with_name("part").write_text(json.dumps([sys.argv, os.environ["JUPYTER_CONFIG_PATH"]]))
said.with_name("part").rename(said)
while True:
    time.sleep(0.05)"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a group of processes")
def test_jupyterlab_is_opened_on_the_first_lesson_and_ends_in_its_own_time(tmp_path: Path) -> None:
    (tmp_path / "jupyterlab.py").write_text(LAB, encoding="utf-8")
    said, mine = tmp_path / "said", tmp_path / "mine"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    course = subprocess.Popen(
        [sys.executable, "-m", "canopyq", "course", str(mine)], start_new_session=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path, "SAID": str(said)}, cwd=tmp_path,
    )  # fmt: skip
    try:
        while not said.exists() and course.poll() is None:
            time.sleep(0.05)
        os.killpg(course.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
        assert course.wait(60) == 7 and (tmp_path / "saved").exists()
    finally:
        course.kill()
    arguments, settings = json.loads(said.read_text())
    assert str(mine / "notebooks" / "00_start_here.ipynb") in arguments
    assert settings.split(os.pathsep)[0] == str(mine / "jupyter")


def test_a_course_without_its_first_lesson_is_still_the_course(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "my_own.ipynb").write_text("{}")
    assert CliRunner().invoke(app, ["course", str(tmp_path), "--no-lab"]).exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["notebooks"]
