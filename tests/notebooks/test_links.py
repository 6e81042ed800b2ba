"""Ways out of a lesson: to the ones before and after it, to the list of all, and to what it cites."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from tools.notebooks import FOLDER

LESSONS = sorted(FOLDER.glob("*.ipynb"))
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


def links(source: str) -> list[str]:
    return [address for _, address in LINK.findall(source)]


def texts(lesson: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(lesson, as_version=4).cells if cell.cell_type == "markdown"]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_link_into_the_project_leads_somewhere(lesson: Path) -> None:
    inside = [address for text in texts(lesson) for address in links(text) if "://" not in address]
    assert inside and [address for address in inside if not (FOLDER / address.split("#")[0]).is_file()] == []


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_what_to_read_has_an_address(lesson: Path) -> None:
    read_more = texts(lesson)[-1].split("**Read more**")[1]
    assert any(address.startswith("https://") for address in links(read_more))


def test_lessons_lead_to_each_other() -> None:
    for one, two in pairwise(LESSONS):
        assert two.name in links(texts(one)[0]) and two.name in links(texts(one)[-1])
        assert one.name in links(texts(two)[0])
