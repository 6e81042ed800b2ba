"""What pyproject.toml cannot say: a wheel carries the course, `canopyq course` copies it out."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

COURSE = ("README.md", "docs/when-it-goes-wrong.md", "notebooks/*.ipynb", "notebooks/more/*.ipynb",
          "benchmarks/results/*.json", "jupyter/**/*.json")  # fmt: skip


class WithCourse(build_py):
    """Puts the course into the package, as `canopyq/course`; an editable install finds it where it lies."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for pattern in COURSE:
            for file in Path().glob(pattern):
                target = Path(self.build_lib, "canopyq", "course", file)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


setup(cmdclass={"build_py": WithCourse})
