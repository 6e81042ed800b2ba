"""The widgets of all lessons and appendices, and what they need, in two notebooks: to open a page and to import torch
for each would take longer than all the clicks."""

from __future__ import annotations

import re

import nbformat

from tests.browser.lab import ROOT
from tests.browser.needed import what_widgets_need

NOTEBOOKS = ROOT / "notebooks"
PATHS = [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted((NOTEBOOKS / "more").glob("*.ipynb"))]
LESSONS = [nbformat.read(path, as_version=4) for path in PATHS]
HALVES = {"course-1.ipynb": (0, 3), "course-2.ipynb": (1, 2)}  # of every four lessons: the two then take as long
COURSE = {
    name: [cell.source for i, lesson in enumerate(LESSONS) if i % 4 in numbers for cell in what_widgets_need(lesson)]
    for name, numbers in HALVES.items()
}


def in_source(name: str, pattern: str) -> list[str]:
    """What a pattern finds in the code of the lessons of one half, whatever of it was left out."""
    code = (
        c.source for i, nb in enumerate(LESSONS) if i % 4 in HALVES[name] for c in nb.cells if c.cell_type == "code"
    )
    return re.findall(pattern, "\n".join(code))
