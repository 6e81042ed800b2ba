"""How much of a lesson a reader has to look at."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from tools.notebooks import APPENDICES, FOLDER, asserted_names, code_cells, is_hidden

CELLS = 45
WORDS = 1500
LINES, COLUMNS = 20, 88  # of a cell in view
STRIP = "lessons.strip()"  # the same in all, and not counted
LESSONS = [path for path in sorted(FOLDER.glob("*.ipynb")) if path.name[:2] != "00"]
ALL = [*LESSONS, *sorted(APPENDICES.glob("*.ipynb"))]


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def words(nb: NotebookNode) -> int:
    """Words of prose: code in fences is not, and a link is its text."""
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    return len(re.sub(r"\]\([^)]*\)", "]", re.sub(r"```.*?```", "", text, flags=re.S)).split())


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_read_at_a_sitting(path: Path) -> None:
    nb = read(path)
    assert STRIP in [cell.source for cell in nb.cells[-2:]], "it ends with how far one has come"
    assert len(nb.cells) - 1 <= CELLS and words(nb) <= WORDS


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_code_in_view_fits_a_screen_and_asserts_are_collapsed(path: Path) -> None:
    shown = [cell.source for cell in code_cells(read(path)) if not is_hidden(cell)]
    too_large = [s for s in shown if len(s.splitlines()) > LINES or max(map(len, s.splitlines())) > COLUMNS]
    assert too_large == []
    assert [source for source in shown if asserted_names(source)] == []


def test_every_appendix_is_linked_both_ways() -> None:
    for appendix in sorted(APPENDICES.glob("*.ipynb")):
        back = re.findall(r"\]\(\.\./(\w+\.ipynb)\)", read(appendix).cells[0].source)
        assert back, appendix.name
        for lesson in back:
            text = "\n".join(cell.source for cell in read(FOLDER / lesson).cells if cell.cell_type == "markdown")
            assert f"](more/{appendix.name})" in text, f"{lesson} does not link to {appendix.name}"
