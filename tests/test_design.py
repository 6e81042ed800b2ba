"""The house of docs/design.md is the law: a file imports only from the floors below its own."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import canopyq

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "canopyq"
ROOF = ("__init__.py", "__main__.py")  # the public face and `python -m canopyq`: above every floor


def read_floors(design: str) -> list[str]:
    """The names in the first column of the table, ground floor first, without ``.py`` and ``/``."""
    return [name.removesuffix(".py").rstrip("/") for name in re.findall(r"^\| `([\w./]+)` \|", design, re.MULTILINE)]


FLOORS = read_floors((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def floor_of(file: str) -> str:
    """``tutor/chat.py`` lives on the floor ``tutor``, ``memory.py`` on ``memory``."""
    return file.split("/")[0].removesuffix(".py")


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, functions included, without what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.orelse:
                yield statement
                yield from walk(statement)
        else:
            yield child
            yield from walk(child)


def imported(source: str, file: str) -> Iterator[tuple[int, str]]:
    """Line and floor of every import from the package; the floor is ``canopyq`` for the package itself.

    ``file`` is relative to the package. Names given to ``import_module`` and ``__import__`` count if spelled out.
    """
    here = ["canopyq", *file.split("/")[:-1]]

    def floor(name: list[str], names: list[str]) -> Iterator[str]:
        if name[:1] != ["canopyq"]:
            return
        if len(name) > 1:
            yield name[1]
            return
        for each in names or [""]:  # from canopyq import x: a floor, or something that only the roof knows
            if each in FLOORS:
                yield each
            elif each != "__version__":
                yield "canopyq"

    def absolute(level: int, module: str | None) -> list[str]:
        start = here[: len(here) - level + 1] if level else []
        return start + (module.split(".") if module else [])

    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from ((node.lineno, f) for f in floor(alias.name.split("."), []))
        elif isinstance(node, ast.ImportFrom):
            name = absolute(node.level, node.module)
            yield from ((node.lineno, f) for f in floor(name, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                level = len(first.value) - len(first.value.lstrip("."))
                name = absolute(level, first.value.lstrip(".") or None)
                yield from ((node.lineno, f) for f in floor(name, []))


def violations(source: str, file: str) -> list[str]:
    """Each import that does not go down, in words.

    The top floor alone may import the package as a whole: it uses what everybody sees, and nothing imports it.
    """
    own = floor_of(file)
    if own not in FLOORS:
        return [f"canopyq/{file} has no floor in docs/design.md, so nothing says what it may import"]
    below = FLOORS[: FLOORS.index(own)]
    found = []
    for line, floor in imported(source, file):
        if floor == "canopyq" and own != FLOORS[-1]:
            found.append(f"canopyq/{file}:{line} imports the package itself; import the module that you need")
        elif floor not in (*FLOORS, "canopyq"):
            found.append(f"canopyq/{file}:{line} imports canopyq.{floor}, which docs/design.md does not name")
        elif floor not in (*below, "canopyq") and not (floor == own and "/" in file):
            found.append(f"canopyq/{file}:{line} imports {floor}, which is no floor below {own}")
    return found


def test_the_table_is_read() -> None:
    assert FLOORS[0] == "errors"
    assert FLOORS[-1] == "cli"
    assert len(FLOORS) == len(set(FLOORS)) >= 15


@pytest.mark.parametrize("file", FILES)
def test_every_module_has_a_floor(file: str) -> None:
    assert file in ROOF or floor_of(file) in FLOORS, f"canopyq/{file} is missing from the table in docs/design.md"


@pytest.mark.parametrize("floor", FLOORS)
def test_every_floor_exists(floor: str) -> None:
    assert (PACKAGE / f"{floor}.py").is_file() or (PACKAGE / floor / "__init__.py").is_file()


@pytest.mark.parametrize("file", [file for file in FILES if file not in ROOF])
def test_imports_go_down(file: str) -> None:
    found = violations((PACKAGE / file).read_text(encoding="utf-8"), file)
    assert not found, "\n".join(found)


def test_nothing_imports_the_top_floor() -> None:
    public = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert FLOORS[-1] not in {floor for _, floor in imported(public, "__init__.py")}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("memory.py", "from canopyq.kernels import dispatch"),
        ("memory.py", "from canopyq import nn"),
        ("memory.py", "from . import nn"),
        ("memory.py", "from .nn import linear"),
        ("memory.py", "import canopyq.nn.linear"),
        ("memory.py", "import canopyq.memory"),
        ("memory.py", "import canopyq as cq"),
        ("memory.py", "from canopyq import quantize"),
        ("memory.py", "from canopyq.attic import box"),
        ("memory.py", "def late():\n    from canopyq.nn import linear"),
        ("memory.py", "class A:\n    def late(self):\n        if self:\n            import canopyq.model"),
        ("memory.py", "from importlib import import_module\nimport_module('canopyq.model')"),
        ("memory.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from canopyq import model"),
        ("tensor/affine.py", "from canopyq.memory import human"),
        ("tutor/chat.py", "from ..cli import main"),
        ("tutor/chat.py", "from .. import lessons"),
        ("tutor/deep/er.py", "from ...cli import main"),
    ],
)
def test_imports_that_go_up_are_seen(file: str, source: str) -> None:
    assert len(violations(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("memory.py", "from canopyq.errors import CanopyError\nfrom . import tensor\nimport torch"),
        ("memory.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from canopyq.nn import linear"),
        ("tensor/affine.py", "from canopyq.tensor import formats\nfrom .formats import get_format"),
        ("tutor/chat.py", "from . import loading\nfrom .loading import load\nfrom canopyq.tutor import questions"),
        ("tutor/chat.py", "from ..errors import CanopyError\nfrom .. import memory"),
        (
            "cli.py",
            "import canopyq as cq\nfrom canopyq import __version__, model\ndef f():\n    from canopyq import tutor",
        ),
    ],
)
def test_imports_that_go_down_are_fine(file: str, source: str) -> None:
    assert violations(source, file) == []


def test_import_is_light() -> None:
    """The command needs no torch to show its version or its help; and what is there without transformers does not bring
    it in, nor any other heavy library, and touches no GPU."""
    script = (
        "import sys, canopyq, canopyq.cli\n"
        "assert 'torch' not in sys.modules\n"
        "import torch; before = set(sys.modules)\n"
        "canopyq.quantize_, canopyq.calibrate, canopyq.mixed_precision, canopyq.explain, canopyq.get_format\n"
        "heavy = {'transformers', 'matplotlib', 'ipywidgets', 'triton', 'IPython', 'playwright', 'torch._dynamo'}\n"
        "print(sorted((set(sys.modules) - before) & heavy), torch.cuda.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] False"


def test_public_names_are_what_they_say_whatever_was_imported_before() -> None:
    """A module must not stand where a function of its name is expected, and type checkers see the same names."""
    for module in pkgutil.walk_packages(canopyq.__path__, "canopyq."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    modules = {name for name in canopyq.__all__ if isinstance(getattr(canopyq, name), ModuleType)}
    assert modules == {"advisor", "lessons", "tutor"}
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If) and is_type_checking(node.test))
    for statement in checked.body:
        for alias in statement.names:
            assert getattr(canopyq, alias.name) is getattr(import_module(statement.module), alias.name)
    named = [alias.name for statement in checked.body for alias in statement.names]
    assert sorted(named) == sorted(canopyq.__all__) == sorted(set(dir(canopyq)) - {"__version__"})


# Names ----------------------------------------------------------------------------------------------------------------


def test_no_function_stands_in_the_place_of_its_module() -> None:
    """`import canopyq.x as m` binds what the package calls ``x``. The lessons call what notebooks use as they like."""
    files = [file for file in FILES if not file.startswith("lessons/") and file.split("/")[-1] not in ROOF]
    names = ["canopyq." + file.removesuffix(".py").replace("/", ".") for file in files]
    test = "\n".join(["import sys", *(f"import {name} as m\nassert m is sys.modules[{name!r}]" for name in names)])
    done = subprocess.run([sys.executable, "-c", test], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
