"""Which statements of a lesson the browser runs."""

from __future__ import annotations

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.browser.needed import what_widgets_need


@pytest.mark.parametrize(
    ("sources", "kept"),
    [
        (["x = 1\nprint(x)", 'q = lessons.quiz("a")\nq'], ['q = lessons.quiz("a")\nq']),
        (["import a.b, c\ny = slow()", "lessons.explore.bits(c)"], ["import a.b, c", "lessons.explore.bits(c)"]),
        (["x = 1", "x = 2", "lessons.explore.bits(x)"], ["x = 2", "lessons.explore.bits(x)"]),
        (["x = []", "x.append(1)", "lessons.explore.bits(x)"], ["x = []", "x.append(1)", "lessons.explore.bits(x)"]),
        (["x = {}", "x[0] = y = 1", "lessons.explore.bits(x)"], ["x = {}", "x[0] = y = 1", "lessons.explore.bits(x)"]),
        (["m = f()", "fill_(m)", "lessons.explore.bits(m)"], ["m = f()", "fill_(m)", "lessons.explore.bits(m)"]),
        (["x = 1", "def f(x):\n    return x", "lessons.explore.bits(f)"],
         ["def f(x):\n    return x", "lessons.explore.bits(f)"]),
        (["y = 1", "def f(x):\n    return x + y", "lessons.explore.bits(f(2))"],
         ["y = 1", "def f(x):\n    return x + y", "lessons.explore.bits(f(2))"]),
        (["seen = []\nh = hook(lambda x: seen.append(x))\nmodel(1)\nz = 0", "lessons.explore.bits(seen[0])"],
         ["seen = []\nh = hook(lambda x: seen.append(x))\nmodel(1)\nz = 0", "lessons.explore.bits(seen[0])"]),
        (["if gpu:\n    x = 1", "x = 0\nassert x == 0", "for x in [3]:\n    pass", "lessons.explore.bits(x)"],
         ["x = 0", "for x in [3]:\n    pass", "lessons.explore.bits(x)"]),
    ],
)  # fmt: skip
def test_what_is_kept(sources: list[str], kept: list[str]) -> None:
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    assert [cell.source for cell in what_widgets_need(notebook)] == kept
