"""JupyterLab in a real browser: a server of its own, and a page object that reads like what a reader does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "canopyq"
PROGRESS = "progress.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},  # a page that is opened again shows nothing of the last run
    "notebook-extension/tracker": {"windowingMode": "defer"},
}
RUN_TIMEOUT = 300_000  # ms for all cells of a notebook
CONTROLS = ".noUi-target, .widget-toggle-buttons"
DRAWN = "[...at.querySelectorAll('.canopyq-line, img')].map(part => part.src || part.innerHTML).join()"


def find_browser() -> str | None:
    """The path of an installed Chromium, the system's or Playwright's own, or None."""
    if path := next((path for name in BROWSERS if (path := shutil.which(name))), None):
        return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
    return str(own) if own.is_file() else None


def barriers(page: Page, within: list[list[str]] | None = None) -> list[str]:
    """What axe-core calls serious or critical of a page, or of the parts that the selectors ``within`` name."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        f"{rule['impact']} {rule['id']}: {node['html'][:160]}"
        for rule in Axe().run(page, within).response["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@contextlib.contextmanager
def lab_server(work: Path, folder: Path) -> Iterator[str]:
    """A JupyterLab on ``folder`` with settings of its own under ``work``; yields its address."""
    environment = dict(os.environ)
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        environment[f"JUPYTER_{name}"] = str(work / name.lower())
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(work / "settings")
    environment["JUPYTERLAB_WORKSPACES_DIR"] = str(work / "workspaces")
    environment["JUPYTER_CONFIG_PATH"] = str(ROOT / "jupyter")  # as `make lab` does
    environment["IPYTHONDIR"] = str(work / "ipython")
    environment["CANOPYQ_PROGRESS"] = str(work / PROGRESS)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    for name, settings in SETTINGS.items():
        file = work / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    with (work / "lab.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_up(address, server, work / "lab.log")
            yield address
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(15)
            server.kill()


def _wait_until_up(address: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server knows its kernels: a page that is opened before asks which one to take."""
    for _ in range(240):
        if server.poll() is not None:
            break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/api/kernelspecs?token={TOKEN}", timeout=20).close()
            return
        time.sleep(0.25)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


class LabPage:
    """One notebook, open in JupyterLab."""

    def __init__(self, page: Page, address: str, notebook: str, screenshots: Path | None = None) -> None:
        self.page, self.address, self.notebook, self.screenshots = page, address, notebook, screenshots
        self._open()

    def _open(self) -> None:
        self.page.goto(f"{self.address}/lab/tree/{self.notebook}?token={TOKEN}&reset")
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        self.wait_idle()
        with contextlib.suppress(Exception):  # the file browser takes a third of the width
            self.page.keyboard.press("Control+b")

    def close(self) -> None:
        """Close the page and end its kernel, whose memory others need."""
        self.page.evaluate(
            """async ([base, token, notebook]) => { const at = base + '/api/sessions';
                for (const s of await (await fetch(at + '?token=' + token)).json()) if (s.path == notebook)
                    await fetch(at + '/' + s.id + '?token=' + token, {method: 'DELETE'}); }""",
            [self.address, TOKEN, self.notebook],
        )
        self.page.close()

    def wait_idle(self) -> None:
        idle = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
        self.page.locator(idle).first.wait_for(timeout=RUN_TIMEOUT)

    def run_all(self) -> None:
        """Run → Run All Cells, and wait until every code cell has its number."""
        done = "texts.length && texts.every(t => /^\\[\\d+\\]:$/.test(t))"
        for _ in range(3):
            assert not (asks := self.page.locator(".jp-Dialog").all_inner_texts()), f"JupyterLab asks: {asks}"
            self.page.locator(".jp-Notebook .jp-Cell").first.click()
            self.page.get_by_role("menuitem", name="Run", exact=True).click()
            self.page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
            self._until(f"texts.includes('[*]:') || {done}", 8_000)
            if self._until(f"!texts.includes('[*]:') || {done}", RUN_TIMEOUT) and self._until(done, 2_000):
                break  # a click that comes while the page is still settling, or its kernel starting, is lost
        else:
            self.photograph("stuck")
            raise AssertionError(f"{self.notebook} did not finish: {' '.join(self.prompts())}")
        self.wait_idle()

    def prompts(self) -> list[str]:
        """The numbers before the code cells, ``[*]:`` for one that runs or waits."""
        return [text.strip() for text in self.page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()]

    def _until(self, condition: str, timeout: float) -> bool:
        """Wait for a condition on the ``texts`` of the prompts; says whether it came true."""
        prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent.trim())"
        try:
            self.page.wait_for_function(
                f"() => {{ const texts = {prompts}; return {condition}; }}", timeout=timeout, polling=250
            )
        except Exception as error:
            if type(error).__name__ != "TimeoutError":
                raise
            return False
        return True

    def save(self) -> None:
        """File → Save Notebook."""
        with self.page.expect_response(lambda r: r.request.method == "PUT" and self.notebook in r.url):
            self.page.keyboard.press("Control+s")

    def restart(self) -> None:
        """Kernel → Restart Kernel."""
        self.page.get_by_role("menuitem", name="Kernel", exact=True).click()
        self.page.locator(".lm-Menu-item[data-command='kernelmenu:restart']").click()
        self.page.locator(".jp-Dialog .jp-mod-accept").click()

    def reopen(self) -> None:
        """Open the notebook anew in the browser, as it was saved."""
        self._open()

    def errors(self) -> list[str]:
        """The text of every error output, which JupyterLab shows as it shows stderr."""
        stderr = self.page.locator('[data-mime-type="application/vnd.jupyter.stderr"]')
        found = stderr.filter(has_text="Traceback (most recent call last)").all_inner_texts()
        broken = self.page.locator(".jp-OutputArea").get_by_text("Error displaying widget").all_inner_texts()
        return [*found, *broken]

    def barriers(self) -> list[str]:
        """What axe-core finds seriously in the way of readers who do not see the page or use no mouse, in all outputs.

        Pictures of matplotlib are left out: JupyterLab gives what it renders as PNG no alternative text.
        """
        return barriers(self.page, [[".jp-OutputArea-output:not(.jp-RenderedImage)"]])

    def choose_theme(self, name: str) -> None:
        """Settings → Theme."""
        self.page.get_by_role("menuitem", name="Settings", exact=True).click()
        self.page.locator(".lm-Menu-itemLabel", has_text="Theme").first.hover()
        self.page.locator(".lm-Menu-item[data-command='apputils:change-theme']", has_text=name).first.click()
        light = str("Light" in name).lower()
        self.page.locator(f"body[data-jp-theme-light='{light}']").wait_for(state="attached")

    def quizzes(self) -> list[str]:
        """The ids of all quizzes in the notebook, in order."""
        classes = [box.get_attribute("class") or "" for box in self.page.locator(".canopyq-quiz").all()]
        return [re.search(r"canopyq-quiz-([\w-]+)", names).group(1) for names in classes]

    def quiz(self, name: str) -> Locator:
        return self.page.locator(f".canopyq-quiz-{name}")

    def answer(self, name: str, letter: str) -> str:
        """Choose and check with the mouse; returns what the feedback then says."""
        quiz = self.quiz(name)
        quiz.scroll_into_view_if_needed()
        before = self.feedback(name)
        quiz.locator(".canopyq-choices button", has_text=re.compile(rf"^\s*{letter}\.")).click()
        quiz.locator(".canopyq-check").click()
        self.page.wait_for_function(
            """([name, before]) => { const at = document.querySelector('.canopyq-quiz-' + name + ' .canopyq-feedback');
                return at.innerText.trim() && at.innerText.trim().split(/\\s+/).join(' ') !== before; }""",
            arg=[name, before],
            timeout=15_000,
        )
        return self.feedback(name)

    def feedback(self, name: str) -> str:
        return " ".join(self.quiz(name).locator(".canopyq-feedback").inner_text().split())

    def chosen(self, name: str) -> str:
        """The letter that is chosen now, or nothing."""
        labels = self.quiz(name).locator(".canopyq-choices button.mod-active").all_inner_texts()
        return labels[0].strip()[0] if labels else ""

    def controls(self) -> list[tuple[int, int]]:
        """Every slider and every row of buttons of the explorers: (which explorer, which of its controls)."""
        explorers = self.page.locator(".canopyq-explore").all()
        return [(i, j) for i, explorer in enumerate(explorers) for j in range(explorer.locator(CONTROLS).count())]

    def move(self, place: tuple[int, int]) -> bool:
        """Move a slider by one step, or press a button that is not chosen; says whether what is shown has changed."""
        explorer = self.page.locator(".canopyq-explore").nth(place[0])
        control = explorer.locator(CONTROLS).nth(place[1])
        control.scroll_into_view_if_needed()
        before = explorer.evaluate(f"at => {DRAWN}")
        if (handle := control.locator(".noUi-handle")).count():
            handle = handle.first
            at_end = float(handle.get_attribute("aria-valuenow")) >= float(handle.get_attribute("aria-valuemax"))
            handle.focus()
            handle.press("ArrowLeft" if at_end else "ArrowRight")
        else:
            control.locator("button:not(.mod-active)").last.click()
        for _ in range(60):
            self.page.wait_for_timeout(100)
            if explorer.evaluate(f"at => {DRAWN}") != before:
                return True
        return False

    def guesses(self) -> list[Locator]:
        """The cards that ask for a number before a cell is run."""
        return self.page.locator(".canopyq-predict").all()

    def guess(self, card: Locator, number: str) -> None:
        """Type a guess and wait until the card has kept it."""
        entry = card.locator(".canopyq-guess input")
        entry.scroll_into_view_if_needed()
        entry.fill(number)
        entry.press("Enter")
        card.filter(has_text=f"Your guess: {number}").wait_for()

    def exercises(self) -> list[str]:
        """The ids of all exercises in the notebook, in order."""
        classes = [box.get_attribute("class") or "" for box in self.page.locator(".canopyq-exercise").all()]
        return [re.search(r"canopyq-exercise-([\w-]+)", names).group(1) for names in classes]

    def exercise(self, name: str) -> Locator:
        return self.page.locator(f".canopyq-exercise-{name}")

    def attempt(self, name: str, source: str, function: str) -> str:
        """Write an answer in place of the exercise's stub, run the cell; returns what the check says."""
        cell = self.page.locator(".jp-CodeCell", has_text=re.compile(rf'{name}"\)\.check\(')).last
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(f'{source.strip()}\n\n\nlessons.exercise("{name}").check({function})')
        number = cell.locator(".jp-InputPrompt").inner_text()
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_function(
            """([cell, number]) => { const now = cell.querySelector('.jp-InputPrompt').innerText;
                return /\\d/.test(now) && now !== number; }""",
            arg=[cell.element_handle(), number],
            timeout=60_000,
        )
        return " ".join(cell.locator(".canopyq-box").first.inner_text().split())

    def photograph(self, label: str, what: Locator | None = None) -> None:
        """Keep a picture of the page or of one element, if a folder for pictures is set."""
        if self.screenshots is None:
            return
        self.screenshots.mkdir(parents=True, exist_ok=True)
        path = self.screenshots / f"{Path(self.notebook).stem}-{label}.png"
        if what is not None:
            what.scroll_into_view_if_needed()
            self.page.wait_for_timeout(250)
        (what or self.page).screenshot(path=path)
