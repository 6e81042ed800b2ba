"""One room has all that the notebooks import."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from canopyq import lessons

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = [*sorted(FOLDER.glob("*.ipynb")), *sorted((FOLDER / "more").glob("*.ipynb"))]


@pytest.mark.parametrize("name", lessons.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(lessons, name) is not None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_know_one_room(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    rooms = set(re.findall(r"^\s*(?:from|import) (canopyq[\w.]*)", code, re.MULTILINE))
    assert rooms <= {"canopyq", "canopyq.lessons"}


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="gptqq"):
        _ = lessons.gptqq
