"""The guards of tools/notebooks.py on every notebook, and on bad ones; and what the nbval plugin adds to nbval."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.notebooks.nbval_plugin import without_blank_streams
from tools import notebooks

NOTEBOOKS = [*sorted(notebooks.FOLDER.glob("*.ipynb")), *sorted(notebooks.APPENDICES.glob("*.ipynb"))]


def shown(source: str, text: str, count: int) -> NotebookNode:
    """A code cell that printed ``text``."""
    return new_code_cell(source, execution_count=count, outputs=[new_output("stream", name="stdout", text=text)])


def good() -> NotebookNode:
    """A small notebook that every guard lets through."""
    cells = [
        new_markdown_cell("# Lesson"),
        new_code_cell("import math\nx = 2", execution_count=1),
        shown("print(x)", "2\n", 2),
        shown("print(x + 1)", "3\n", 3),
        new_markdown_cell("## Recap\n1. Two is even."),
    ]
    return new_notebook(cells=cells)


def checks(source: str = "assert seconds > 0") -> NotebookNode:
    """A collapsed cell that asserts."""
    return new_code_cell(source, execution_count=4, metadata={"tags": ["checks"], "jupyter": {"source_hidden": True}})


def with_ignored_output(*more: NotebookNode) -> NotebookNode:
    nb = good()
    nb.cells[3].source = "seconds = 1.2\nprint(seconds)"
    nb.cells[3].metadata["tags"] = ["nbval-ignore-output"]
    nb.cells[4:4] = more
    return nb


def test_a_cell_of_checks_may_stand_for_an_assert_in_view(tmp_path: Path) -> None:
    assert notebooks.problems(save(with_ignored_output(checks()), tmp_path)) == []
    for nothing in ((), (checks("assert x == 2"),)):
        found = notebooks.problems(save(with_ignored_output(*nothing), tmp_path))
        assert len(found) == 1 and "cell 3 is tagged nbval-ignore-output" in found[0]


@pytest.mark.parametrize("spoil", [
    lambda cell: cell.update(source="seconds"), lambda cell: cell.metadata.pop("jupyter"),
    lambda cell: cell.outputs.append(new_output("stream", name="stdout", text="1")),
])  # fmt: skip
def test_a_cell_of_checks_asserts_shows_nothing_and_is_collapsed(spoil: Callable, tmp_path: Path) -> None:
    spoil(cell := checks("assert x == 2"))
    nb = good()
    nb.cells.insert(4, cell)
    assert "cell 4 is tagged checks" in " ".join(notebooks.problems(save(nb, tmp_path)))


def save(nb: NotebookNode, folder: Path, name: str = "lesson.ipynb") -> Path:
    path = folder / name
    nbformat.write(nb, path)
    return path


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS, f"no notebooks in {notebooks.FOLDER}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path: Path) -> None:
    found = notebooks.problems(path)
    assert not found, "\n".join([path.name, *found])


def test_a_good_notebook_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(good(), tmp_path)
    assert notebooks.problems(path) == []
    assert notebooks.main(["check", str(path)]) == 0
    assert re.fullmatch(r"lesson\.ipynb +\d+ KiB  ok\n", capsys.readouterr().out)


def not_executed(nb: NotebookNode) -> None:
    for cell in notebooks.code_cells(nb):
        cell.outputs, cell.execution_count = [], None


def out_of_order(nb: NotebookNode) -> None:
    nb.cells[2].execution_count, nb.cells[3].execution_count = 3, 2


def one_silenced(nb: NotebookNode) -> None:
    nb.cells[2].outputs = []


def few_outputs(nb: NotebookNode) -> None:
    for index in (2, 3):
        nb.cells[index].source, nb.cells[index].outputs = "y = 3", []


def error_output(nb: NotebookNode) -> None:
    nb.cells[2].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])]


def stderr(nb: NotebookNode) -> None:
    nb.cells[2].outputs.append(new_output("stream", name="stderr", text="  0%|"))


def progress_bar(nb: NotebookNode) -> None:
    nb.cells[2].outputs.append(new_output("stream", name="stdout", text="evaluating:  93%|█████▎| 13/14 [00:02<00:00]"))


def widget_state(nb: NotebookNode) -> None:
    nb.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2}}


def widget_view(nb: NotebookNode) -> None:
    view = {"model_id": "abc", "version_major": 2, "version_minor": 0}
    nb.cells[2].outputs = [new_output("display_data", {"text/html": "<p>", notebooks.WIDGET_VIEW: view})]


def widget_without_html(nb: NotebookNode) -> None:
    nb.cells[2].outputs = [new_output("display_data", {"text/plain": "IntSlider(value=3)"})]


def too_big(nb: NotebookNode) -> None:
    nb.cells[2].outputs[0].text = "x" * notebooks.MAX_BYTES


def no_recap(nb: NotebookNode) -> None:
    nb.cells[-1].source = "That was it, no recap."


def line_repr(nb: NotebookNode) -> None:
    data = {"text/plain": "[<matplotlib.lines.Line2D at 0x7f0000000000>]"}
    nb.cells[2].outputs = [new_output("execute_result", data, execution_count=2)]


def unchecked(nb: NotebookNode) -> None:
    nb.cells[2].metadata["tags"] = ["nbval-ignore-output"]


def skipped(nb: NotebookNode) -> None:
    nb.cells[2].metadata["tags"] = ["nbval-skip"]


def home(nb: NotebookNode) -> None:
    nb.cells[2].outputs[0].text = "wrote /home/ada/canopy/out/model.safetensors\n"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (not_executed, "was not executed top to bottom: code cell 1 has execution count None"),
        (out_of_order, "was not executed top to bottom: code cell 2 has execution count 3"),
        (one_silenced, "cell 2 holds no output"),
        (few_outputs, "holds outputs in 0 of 3 code cells"),
        (error_output, "cell 2 holds an error: ValueError: no"),
        (stderr, "cell 2 holds stderr text"),
        (progress_bar, "cell 2 holds a progress bar"),
        (widget_state, "holds widget state"),
        (widget_view, "cell 2 holds a widget view"),
        (widget_without_html, "cell 2 shows a widget that has no plain HTML form"),
        (too_big, "the limit is 1 MiB"),
        (no_recap, "does not end in a recap"),
        (line_repr, "shows '[<matplotlib.lines.Line2D"),
        (unchecked, "cell 2 is tagged nbval-ignore-output"),
        (skipped, "cell 2 is tagged to be skipped"),
        (home, "cell 2 shows a path of the machine it ran on: /home/ada"),
    ],
)
def test_guards_see(
    spoil: Callable[[NotebookNode], None], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nb = good()
    spoil(nb)
    path = save(nb, tmp_path)
    assert any(words in problem for problem in notebooks.problems(path))
    assert notebooks.main(["check", str(path)]) == 1
    assert words in capsys.readouterr().out


def test_no_notebook_at_all(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ipynb"
    broken.write_text("{", encoding="utf-8")
    assert "is no valid notebook" in notebooks.problems(broken)[0]
    assert notebooks.main(["check", str(broken)]) == 1


def test_guards_allow_what_is_meant(tmp_path: Path) -> None:
    nb = good()
    error_output(nb)
    nb.cells[2].metadata["tags"] = ["raises-exception"]
    nb.cells[3].metadata["tags"] = ["nbval-ignore-output"]
    nb.cells[3].source = "%time y = x + 1\nassert y == 3\nprint(y)"
    assert notebooks.problems(save(nb, tmp_path)) == []


@pytest.mark.parametrize(
    "source", ["x", "f(x)", "print(1)\ny = 2", "with a:\n    print(1)", "fig.show();", "'x' # a; b"]
)
def test_cells_that_must_show(source: str) -> None:
    assert notebooks.must_show(source)


@pytest.mark.parametrize(
    "source",
    ["", "x = 1", "f(x);", "f(x);  # quiet", "def f():\n    print(1)", "if gpu:\n    print(1)", "assert x == 1"],
)
def test_cells_that_may_be_silent(source: str) -> None:
    assert not notebooks.must_show(source)


# --- executing -------------------------------------------------------------------------------------------------------

WIDGET = """import sys
import ipywidgets
class Card(ipywidgets.VBox):
    def _repr_mimebundle_(self, **kwargs):
        return super()._repr_mimebundle_(**kwargs) | {"text/html": "<p>the question</p>"}
Card([ipywidgets.HTML("live")])"""
BAR = """from tqdm import tqdm
for _ in tqdm(range(3)):
    pass
print("a warning", file=sys.stderr)
print("done")"""
SETTINGS = """import os
from pathlib import Path
progress = Path(os.environ["CANOPYQ_PROGRESS"])
print(progress.exists(), "CANOPYQ_MODEL" in os.environ, os.environ["OMP_NUM_THREADS"])
progress.write_text("the next notebook must not see this");"""
PICTURE = """import io
from IPython.display import Image
from PIL import Image as Picture
file = io.BytesIO()
Picture.new("RGB", (8, 8)).save(file, "png")
Image(file.getvalue())"""
TIMES = "import time\nprint(f'{time.perf_counter():.3f} s,', object())"


@pytest.fixture(scope="module")
def progress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The progress file of a learner in the middle of the course, whose settings are in the environment."""
    file = tmp_path_factory.mktemp("learner") / "mine.json"
    file.write_text("{}", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def executed(progress: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A notebook with widgets, progress bars, a picture, timings and settings, all that comes out differently in every
    run, once it was executed; and what was said meanwhile."""
    cells = [new_code_cell(source) for source in (WIDGET, BAR, SETTINGS, PICTURE, TIMES)]
    path = save(
        new_notebook(cells=[*cells, new_markdown_cell("## Recap")]), tmp_path_factory.mktemp("lessons"), "one.ipynb"
    )
    settings = {"CANOPYQ_PROGRESS": str(progress), "CANOPYQ_MODEL": "another/model", "MPLBACKEND": "agg"}
    settings["OMP_NUM_THREADS"] = "2"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        for name, value in settings.items():
            patch.setenv(name, value)
        assert notebooks.main(["execute", str(path)]) == 0
    return path, said.getvalue()


@pytest.mark.slow
def test_execute_stores_what_git_should_hold(executed: tuple[Path, str], progress: Path) -> None:
    path, said = executed
    assert "note: cell 1 said on stderr: a warning" in said and "note: cell 1 said on stderr: 0%" not in said
    done = nbformat.read(path, as_version=4)
    widget, bar, settings, picture, _ = (cell.outputs for cell in notebooks.code_cells(done))
    assert [cell.execution_count for cell in notebooks.code_cells(done)] == [1, 2, 3, 4, 5]
    assert widget[0].data["text/html"] == "<p>the question</p>" and notebooks.WIDGET_VIEW not in widget[0].data
    assert bar == [new_output("stream", name="stdout", text="done\n")]
    assert settings[0].text == "False False 2\n"
    assert picture[0].data["image/png"]
    assert set(done.metadata) == {"kernelspec", "language_info"}
    assert progress.read_text(encoding="utf-8") == "{}"


def test_a_bar_that_came_in_pieces_is_wiped_out() -> None:
    def said(*pieces: str) -> list[str]:
        cell = new_code_cell("x", outputs=[new_output("stream", name="stdout", text=text) for text in pieces])
        notebooks.clean(new_notebook(cells=[cell]))
        return [output.text for output in cell.outputs]

    assert said("\rhalf: 50%|#", "####     | 1/2", "\r           ", "\r") == []
    assert said("one\n", "\rhalf: 50%|", "\r     \r", "two\n") == ["one\ntwo\n"]


def test_nbval_compares_no_bar() -> None:
    bar = [new_output("stream", name="stdout", text=text) for text in ("\rhalf: 50%|#", "\r        \r")]
    value = new_output("display_data", data={"text/plain": "3"})
    assert without_blank_streams([*bar, value]) == [value] and without_blank_streams([]) == []
    assert without_blank_streams([*bar, new_output("stream", name="stdout", text="done\n")])[0].text == "done\n"


@pytest.mark.slow
def test_execute_leaves_a_failing_notebook_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nb = good()
    nb.cells[3].source = "1 / 0"
    path = save(nb, tmp_path)
    before = path.read_bytes()
    assert notebooks.main(["execute", str(path)]) == 1
    assert "lesson.ipynb, cell 3: ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- nbval -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nbval_accepts_what_execute_stored_and_sees_what_is_wrong(
    executed: tuple[Path, str], progress: Path, tmp_path: Path
) -> None:
    """One worker of what the Makefile runs. Its second notebook must not see the progress of the first; a wrong number
    fails, and so does what follows a cell that took too long."""
    wrong, late = good(), good()
    wrong.cells[3].outputs[0].text = "4\n"
    late.cells[2].source = "import time\ntime.sleep(60)"
    late.cells[3].source = "raise SystemError('this must be seen')"
    save(wrong, tmp_path, "wrong.ipynb")
    save(late, tmp_path, "late.ipynb")
    for name in ("one.ipynb", "two.ipynb"):
        shutil.copy(executed[0], tmp_path / name)
    command = [sys.executable, "-m", "pytest", str(tmp_path), f"--rootdir={tmp_path}", "-p", "no:cacheprovider"]
    command += ["-p", "tests.notebooks.nbval_plugin", "--nbval", "--nbval-current-env", "--color=no"]
    command += ["--nbval-sanitize-with=tests/notebooks/sanitize.cfg", "-n", "1", "--dist", "loadfile"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    clean |= {"CANOPYQ_PROGRESS": str(progress), "CANOPYQ_MODEL": "another/model", "MPLBACKEND": "agg"}
    clean["OMP_NUM_THREADS"] = "2"
    done = subprocess.run(
        [*command, "--nbval-cell-timeout=3"], cwd=notebooks.ROOT, env=clean, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "3 failed, 13 passed" in done.stdout and "xfailed" not in done.stdout, done.stdout
    for name, cell in (("wrong", 2), ("late", 1), ("late", 2)):
        assert re.search(rf"^FAILED .*{name}\.ipynb::Cell {cell}\b", done.stdout, re.M)
    assert "this must be seen" in done.stdout
    assert re.search(r"seconds per notebook.*\d+\.\d  late\.ipynb\n", done.stdout, re.S)
    assert progress.read_text(encoding="utf-8") == "{}"
