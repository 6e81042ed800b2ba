"""What nbval needs to judge the course, loaded by ``-p tests.notebooks.nbval_plugin``.

* stderr is not compared: progress bars never come out twice alike, and `tools/notebooks.py` does not store them.
* A bar in stdout, which appears after two seconds and is wiped out at the end, is not compared either.
* Cells run as in JupyterLab, with history: nbval's own way shows what a ``;`` at the end of a line should keep quiet.
* After a timeout nbval marks the rest of the notebook as expected to fail. Here nothing is: a failure is a failure.
* Every notebook starts with no progress and none of the learner's settings.
* A table at the end says how many seconds each notebook took.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path

import nbval.plugin
import pytest
from nbval.kernel import RunningKernel

from tools.notebooks import lesson_environment


def pytest_configure(config: pytest.Config) -> None:
    config.option.runxfail = True
    RunningKernel.execute_cell_input = execute_with_history
    nbval.plugin.coalesce_streams = without_blank_streams
    config.pluginmanager.register(FreshStart(), "canopyq-fresh-start")
    config.pluginmanager.register(Stopwatch(), "canopyq-stopwatch")


def without_blank_streams(outputs: list, join=nbval.plugin.coalesce_streams) -> list:
    """What nbval compares, less the streams of which nothing is left to see."""
    return [output for output in join(outputs) if output.output_type != "stream" or output.text.strip()]


def execute_with_history(kernel: RunningKernel, source: str, allow_stdin: bool | None = None) -> str:
    """Send a cell to the kernel; returns the id of the message."""
    return kernel.kc.execute(source, allow_stdin=allow_stdin, stop_on_error=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for notebook in {item.parent for item in items if hasattr(item.parent, "skip_compare")}:
        notebook.skip_compare += ("stderr",)


class FreshStart:
    """Gives each notebook an empty progress file. nbval's kernels inherit the environment of this process."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.notebook: Path | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.path != self.notebook:
            self.notebook = item.path
            fresh = lesson_environment(Path(self.folder.name) / item.path.stem)
            os.environ.clear()
            os.environ.update(fresh)

    def pytest_unconfigure(self) -> None:
        self.folder.cleanup()


class Stopwatch:
    """Adds up each notebook's seconds, kernel start included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid.split("::")[0]] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("seconds per notebook")
        for name, seconds in sorted(self.seconds.items()):
            terminalreporter.write_line(f"{seconds:7.1f}  {name}")
