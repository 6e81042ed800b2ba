"""Where the course's files lie: around the package in a clone of the project, within it where a wheel was installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def course_folder() -> Path:
    """The folder that holds ``notebooks``, ``jupyter`` (settings of JupyterLab) and ``benchmarks/results``."""
    installed = PACKAGE / "course"  # setup.py puts it into wheels
    return installed if installed.is_dir() else PACKAGE.parent
