"""Builds the book: every lesson as a page that needs no kernel, with the reference of the package and a search.

    python tools/book.py                          into build/book/html
    python tools/book.py --out DIR --record 01    into DIR, with the explorers of lesson 01 alone

The notebooks' stored outputs become pages. Cards that a kernel answers in JupyterLab answer in the page: `book.js` in
`docs/book/static/` judges quizzes, holds guesses against what was measured, and shows what explorers drew beforehand,
for which the notebooks run once more. A page fetches nothing from anywhere.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

import canopyq as cq
from canopyq.lessons import quizzes
from canopyq.lessons.html import heading
from canopyq.lessons.text import block, inline
from canopyq.utils import track

ROOT = Path(__file__).resolve().parent.parent
MAKER = ROOT / "docs" / "book"
PAGES = ("when-it-goes-wrong.md", "serving.md", "design.md")
MEASURED = re.compile(r"Measured: <b>(.*?)</b>")
EXPLORER = re.compile(r"Explore ([\w-]+):")


def quiz_form(name: str) -> str:
    """The quiz as a form: each choice holds whether it is right, and why, in a template that opens on "Check"."""
    quiz = quizzes.load(name)
    choices = "".join(
        f'<label class="cq-choice"><input type="radio" name="quiz-{name}" value="{c.letter}">'
        f"<span>{inline(c.text)}</span></label>"
        f'<template data-choice="{c.letter}" data-right="{str(c.correct).lower()}">{inline(c.reason)}</template>'
        for c in quiz.choices
    )
    return (
        f'<form class="cq-card cq-quiz" data-name="{name}">{heading("Quiz", quiz.title)}'
        f"<fieldset><legend>{block(quiz.question)}</legend>{choices}</fieldset>"
        '<button type="submit">Check</button><div class="cq-verdict" aria-live="polite"></div></form>'
    )


def guess_form(name: str, question: str, unit: str) -> str:
    """A number to guess; the measurement further down opens with it."""
    return (
        f'<form class="cq-card cq-guess" data-name="{html.escape(name)}" data-unit="{html.escape(unit)}">'
        f"{heading('Predict', 'Before you look')}{question}"
        f'<label>My guess <input type="text" inputmode="decimal" placeholder="a number"></label> {inline(unit)} '
        '<button type="submit">Keep my guess</button><div class="cq-verdict" aria-live="polite"></div></form>'
    )


def measurement(name: str, stored: str) -> str:
    """What was measured, hidden until there is a guess."""
    return (
        f'<div class="cq-card cq-measured" data-name="{html.escape(name)}">'
        '<p class="cq-waiting">Measured. Make your guess on the card above, and it opens here. '
        '<button type="button">Show it without a guess</button></p>'
        f'<div class="cq-verdict" aria-live="polite"></div><template>{stored}</template></div>'
    )


def explorer_card(recorded: dict[str, Any], stored: str) -> str:
    """What an explorer drew beforehand, to move through; ``stored`` is its table, for a page without scripts."""
    data = json.dumps(recorded).replace("</", "<\\/")
    name = f'class="cq-card cq-explore" data-name="{html.escape(recorded["name"])}"'
    return (
        f'<div {name}>{heading("Explore", recorded["title"])}<div class="cq-controls"></div>'
        f'<div class="cq-line" aria-live="polite"></div><img class="cq-picture" alt="" hidden>'
        f'<script type="application/json">{data}</script><noscript>{stored}</noscript></div>'
    )


def interactive(output: Any, source: str, guesses: dict[str, str], recordings: dict[str, Any]) -> str | None:
    """The HTML that takes the place of a stored card, or None where the stored one is as good.

    Args:
        guesses: variable -> name of the guess that it holds, of the cells before; the cell's own are added.
        recordings: what each explorer of the lesson drew, by its name.
    """
    stored, plain = output.data.get("text/html", ""), output.data.get("text/plain", "")
    if found := re.match(r"Quiz ([\w-]+):", plain):
        return quiz_form(found[1])
    if found := re.match(r"Predict ([\w-]+):", plain):
        if variable := re.search(r"^(\w+) = lessons\.predict\(", source, re.M):
            guesses[variable[1]] = found[1]
        unit = re.search(r'unit="([^"]*)"', source)
        question = re.sub(r"^<div[^>]*>\s*<div.*?</div>|</div>$", "", stored, flags=re.S)
        return guess_form(found[1], question, unit[1] if unit else "")
    if plain.startswith("Measured:") and (variable := re.search(r"^(\w+)\.reveal\(", source, re.M)):
        return measurement(guesses[variable[1]], MEASURED.search(stored)[0])
    if (found := EXPLORER.match(plain)) and found[1] in recordings:
        return explorer_card(recordings[found[1]], stored)
    return None


def record(notebook: Path) -> dict[str, Any]:
    """Run a lesson up to its last explorer; what each of them draws, by its name."""
    lesson = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        cells, wanted = [], []
        for i, cell in enumerate(lesson.cells):
            cells.append(cell)
            if any(EXPLORER.match(o.get("data", {}).get("text/plain", "")) for o in cell.get("outputs", [])):
                path = Path(folder) / f"{i}.json"
                wanted.append((len(cells) + 1, path))
                code = f"from canopyq.lessons.explore.recording import record\nrecord(Out[max(Out)], {str(path)!r})"
                cells.append(nbformat.v4.new_code_cell(code))
        if not wanted:
            return {}
        lesson.cells = cells[: wanted[-1][0]]
        NotebookClient(lesson, timeout=600, resources={"metadata": {"path": str(notebook.parent)}}).execute()
        recordings = [json.loads(path.read_text(encoding="utf-8")) for _, path in wanted]
    return {recording["name"]: recording for recording in recordings}


def alternative(cell: Any) -> str:
    """What a picture of matplotlib's says to those who do not see it: its title, and the numbers printed beside it."""
    title = re.search(r'title=\(?\s*f?"((?:[^"\\]|\\.)*)"', cell.source)
    said = re.sub(r"\{[^{}]*\}", "…", title[1]) if title else ""
    printed = " ".join(o.text for o in cell.outputs if o.output_type == "stream")
    return " ".join(f"Chart. {said}. {printed}".replace("Chart. . ", "Chart. ").split())


def page_of(notebook: Path, recordings: dict[str, Any]) -> nbformat.NotebookNode:
    """The lesson with its cards made to answer in the page."""
    lesson = nbformat.read(notebook, as_version=4)
    guesses: dict[str, str] = {}
    for cell in lesson.cells:
        cell.source = re.sub(r"\]\(((?:\.\./)+)README\.md#the-map\)", r"](\1index.md)", cell.source)
        cell.source = cell.source.replace("](../docs/", "](../")
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            cell.metadata["mystnb"] = {"image": {"alt": alternative(cell)}}
        for output in cell.get("outputs", []):
            if "data" in output and (form := interactive(output, cell.source, guesses, recordings)):
                output.data["text/html"] = form
    return lesson


def reference() -> str:
    """A page with every public name, from its docstring."""
    lines = ["# Reference", "", "Everything that `import canopyq as cq` gives, by what it does.", ""]
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": [], "Tables": []}
    for name in cq.__all__:
        thing = getattr(cq, name)
        if isinstance(thing, type):
            kinds["Classes"].append(f"```{{eval-rst}}\n.. autoclass:: canopyq.{name}\n   :members:\n```\n")
        elif callable(thing):
            kinds["Functions"].append(f"```{{eval-rst}}\n.. autofunction:: canopyq.{name}\n```\n")
        elif isinstance(thing, dict):
            kinds["Tables"].append(f"### `{name}`\n\n{', '.join(f'`{key}`' for key in thing)}\n")
    for kind, entries in kinds.items():
        lines += [f"## {kind}", "", *entries]
    return "\n".join(lines)


def stage(sources: Path, lessons: list[str] | None) -> None:
    """Write what Sphinx reads; ``lessons`` are those whose explorers are recorded, None for all."""
    shutil.copytree(MAKER, sources)
    (sources / "lessons" / "more").mkdir(parents=True)
    folder = ROOT / "notebooks"
    notebooks = [*sorted(folder.glob("*.ipynb")), *sorted(folder.glob("more/*.ipynb"))]
    for notebook in track(notebooks, "recording explorers"):
        recordings = record(notebook) if lessons is None or notebook.name[:2] in lessons else {}
        nbformat.write(page_of(notebook, recordings), sources / "lessons" / notebook.relative_to(folder))
    (sources / "reference.md").write_text(reference(), encoding="utf-8")
    for page in PAGES:
        shutil.copy(ROOT / "docs" / page, sources / page)


def build(out: Path, lessons: list[str] | None = None) -> None:
    """Write the book into ``out``; a warning of Sphinx is an error."""
    from sphinx.cmd.build import main

    with tempfile.TemporaryDirectory() as folder:
        sources, trees = Path(folder) / "source", Path(folder) / "doctrees"
        stage(sources, lessons)
        if status := main(["-q", "-W", "--keep-going", "-b", "html", "-d", str(trees), str(sources), str(out)]):
            raise SystemExit(status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "book" / "html")
    parser.add_argument("--record", nargs="*", metavar="NN", help="lessons to record explorers of; all unless given")
    options = parser.parse_args()
    build(options.out, options.record)
