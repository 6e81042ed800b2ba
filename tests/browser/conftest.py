"""One browser and one JupyterLab for all browser tests; with ``-n 2``, for those of each worker.

``CANOPYQ_SCREENSHOTS=folder`` keeps pictures. ``CANOPYQ_REQUIRE_BROWSER=1`` makes a missing browser a failure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.course import COURSE
from tests.browser.demo import NOTEBOOKS, write
from tests.browser.lab import ARGUMENTS, LabPage, find_browser, lab_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def missing() -> str:
    """Why the browser tests cannot run here; empty if they can."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install playwright"
    return "" if find_browser() else "no Chromium found: apt-get install chromium"


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the server: its settings, its log, the course, and the progress file of its kernels."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The one Chromium: Playwright starts once in a process."""
    if reason := missing():
        if os.environ.get("CANOPYQ_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def address(workplace: Path, browser: Browser) -> Iterator[str]:
    """A JupyterLab on the widgets of the course and on the tests' own notebooks, with no reader's progress."""
    folder = workplace / "course"
    folder.mkdir()
    for name, cells in (COURSE | NOTEBOOKS).items():
        write(folder / name, cells)
    with lab_server(workplace, folder) as url:
        yield url


@pytest.fixture(scope="session")
def visit(address: str, browser: Browser) -> Iterator[Callable[[str], AbstractContextManager[LabPage]]]:
    """``with visit("widgets.ipynb") as lab`` opens a notebook in a page of its own, and closes it with its kernel."""
    folder = os.environ.get("CANOPYQ_SCREENSHOTS")
    window = browser.new_context(viewport={"width": 1280, "height": 1000})
    window.set_default_timeout(20_000)
    yield lambda name: closing(LabPage(window.new_page(), address, name, Path(folder) if folder else None))
    window.close()
