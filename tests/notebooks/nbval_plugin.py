"""What nbval needs to judge the course, loaded by ``-p tests.notebooks.nbval_plugin``.

* stderr is not compared: progress bars never come out twice alike, and `tools/notebooks.py` does not store them.
* A bar in stdout, which appears after two seconds and is wiped out at the end, is not compared either.
* Cells run as in JupyterLab, with history: nbval's own way shows what a ``;`` at the end of a line should keep quiet.
* After a timeout nbval marks the rest of the notebook as expected to fail. Here nothing is: a failure is a failure.
* Every notebook starts with no progress and none of the learner's settings.
* A notebook has 60 seconds and the whole course six minutes; a table at the end says where they went. At twice that
  the run fails, and later where other programs want the same cores.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import nbval.plugin
import pytest
from nbval.kernel import RunningKernel

from tools.notebooks import lesson_environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("canopyq", "Canopy Quantization notebooks")
    group.addoption("--notebook-seconds", type=float, default=60, help="longest time for one notebook; 0: no limit")
    group.addoption("--course-seconds", type=float, default=360, help="longest time for all of them; 0: no limit")


def pytest_configure(config: pytest.Config) -> None:
    config.option.runxfail = True
    RunningKernel.execute_cell_input = execute_with_history
    nbval.plugin.coalesce_streams = without_blank_streams
    config.pluginmanager.register(FreshStart(), "canopyq-fresh-start")
    if not hasattr(config, "workerinput"):  # with -n, only the process that sees every notebook keeps the time
        config.pluginmanager.register(Stopwatch(config), "canopyq-stopwatch")


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
    """Adds up each notebook's seconds, kernel start included, and takes the time of the whole course on the clock.

    Every limit that is exceeded is said. The run fails at twice the limit, times the number of processes that shared
    a core, since other work slows a machine.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.limit: float = config.option.notebook_seconds
        self.limit_all: float = config.option.course_seconds
        self.seconds: dict[str, float] = defaultdict(float)
        self.begin = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid.split("::")[0]] += report.duration

    def complaints(self, tolerance: float = 1) -> list[str]:
        """What took longer than ``tolerance`` times its limit."""
        slow = [
            f"{name} took {seconds:.0f} s; the limit is {self.limit:.0f} s"
            for name, seconds in self.seconds.items()
            if 0 < tolerance * self.limit < seconds
        ]
        total = time.monotonic() - self.begin
        if 0 < tolerance * self.limit_all < total:
            slow.append(f"all notebooks together took {total:.0f} s; the limit is {self.limit_all:.0f} s")
        return slow

    def patience(self) -> float:
        """How many times a limit may be exceeded, by the load of the last five minutes."""
        return 2 * max(1.0, os.getloadavg()[1] / (os.cpu_count() or 1))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.complaints(self.patience()) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("seconds per notebook")
        for name, seconds in sorted(self.seconds.items()):
            terminalreporter.write_line(f"{seconds:7.1f}  {name}")
        terminalreporter.write_line(f"{time.monotonic() - self.begin:7.1f}  all, on the clock")
        for line in self.complaints():
            terminalreporter.write_line(f"TOO SLOW: {line}", red=True)
