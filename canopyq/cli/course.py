"""`canopyq course`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from canopyq.cli.output import print_plain
from canopyq.errors import CanopyError

PART = ".canopyq-course.part"  # a copy under way, in the folder that it is for


def course(
    folder: Annotated[Path, typer.Argument(help="Where the course is kept; made if it is not there.")] = Path(
        "canopyq-course"
    ),
    lab: Annotated[bool, typer.Option(help="Open JupyterLab.")] = True,
) -> None:
    """Copy the lessons to a folder and open them in JupyterLab. Called again, it opens them as you left them."""
    from canopyq.checkpoint.files import as_path
    from canopyq.lessons.files import course_folder

    folder, source = as_path(folder).resolve(), course_folder()
    first = "00_start_here.ipynb"
    if not (source / "notebooks" / first).is_file():
        raise CanopyError(f"{source} holds no lessons; install canopyq from a wheel, or open a clone by make lab")
    if lab and importlib.util.find_spec("jupyterlab") is None:
        raise CanopyError('JupyterLab is not installed: pip install "canopyq[course]"')
    if not any(folder.glob("notebooks/*.ipynb")):
        part = folder / PART
        if folder.exists() and not part.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CanopyError(f"{folder} is there and is no folder of this course; name another")
        shutil.rmtree(part, ignore_errors=True)
        for name in ("jupyter", "notebooks"):
            unwanted = shutil.ignore_patterns(".*", "__pycache__")  # a reader's own progress, in a clone
            shutil.copytree(source / name, part / name, ignore=unwanted)
        (part / "docs").mkdir()
        for name in ("README.md", "docs/when-it-goes-wrong.md"):  # what lessons lead to
            shutil.copyfile(source / name, part / name)
        for name in ("README.md", "docs", "jupyter", "notebooks"):  # the lessons last: they say that all is there
            if not (folder / name).exists():  # moved whole by a call that was cut short
                (part / name).rename(folder / name)
        shutil.rmtree(part)
    print_plain(f"the lessons lie in {folder / 'notebooks'}")
    if lab:
        settings = os.pathsep.join(filter(None, (str(folder / "jupyter"), os.environ.get("JUPYTER_CONFIG_PATH"))))
        as_root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        opened = folder / "notebooks" / first
        opened = opened if opened.is_file() else opened.parent  # a reader may rename a lesson
        command = [sys.executable, "-m", "jupyterlab", str(opened), *as_root]
        with subprocess.Popen(command, env=os.environ | {"JUPYTER_CONFIG_PATH": settings}) as running:
            while running.poll() is None:
                with contextlib.suppress(KeyboardInterrupt):  # JupyterLab asks whether to stop, and saves
                    running.wait()
        raise typer.Exit(running.returncode)
