"""What every command shares: the console, the --json flag, and how JSON is printed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from canopyq.errors import printable

console = Console()
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(content: Any) -> None:
    """Valid JSON on stdout: NaN and infinity are refused."""
    print(json.dumps(content, indent=2, allow_nan=False), flush=True)


def print_plain(text: object, style: str | None = None) -> None:
    """Lines as they are, without markup, and never broken by a narrow terminal."""
    lines = "\n".join(map(printable, str(text).split("\n")))
    console.print(lines, style=style, highlight=False, markup=False, soft_wrap=True)


def cell(text: object) -> str:
    """Text for a table or a line with markup in it: whatever it holds, it is shown and does nothing."""
    return escape(printable(str(text)))
