"""One browser and one JupyterLab for all browser tests.

``CANOPYQ_SCREENSHOTS=folder`` keeps pictures. ``CANOPYQ_REQUIRE_BROWSER=1`` makes a missing browser a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.demo import write_demo
from tests.browser.lab import ARGUMENTS, ROOT, LabPage, find_browser, lab_server


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
def address(workplace: Path) -> Iterator[str]:
    """A JupyterLab on a copy of the notebooks, with no reader's progress."""
    if reason := missing():
        if os.environ.get("CANOPYQ_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = workplace / "course"
    source = ROOT / "notebooks"
    hidden = shutil.ignore_patterns(".*", "__pycache__")
    shutil.copytree(source, folder, ignore=hidden) if source.is_dir() else folder.mkdir()
    for name in ("demo.ipynb", "restart.ipynb", "widgets.ipynb"):  # tests that write into it share no copy
        write_demo(folder / name)
    with lab_server(workplace, folder) as url:
        yield url


@pytest.fixture(scope="session")
def chromium(address: str) -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    path = find_browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_notebook(chromium, address: str) -> Iterator[Callable[[str], LabPage]]:
    """``open_notebook("demo.ipynb")`` gives the notebook, open in a fresh window."""
    context = chromium.new_context(viewport={"width": 1280, "height": 1000})
    context.set_default_timeout(20_000)
    folder = os.environ.get("CANOPYQ_SCREENSHOTS")

    def opened(name: str) -> LabPage:
        return LabPage(context.new_page(), address, name, Path(folder) if folder else None)

    yield opened
    context.close()
