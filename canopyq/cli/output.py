"""What every command shares: the console, the --json flag, and how JSON is printed."""

from __future__ import annotations

import json
import re
import textwrap
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from canopyq.errors import printable

console = Console()
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(content: Any) -> None:
    """Valid JSON on stdout: NaN and infinity are refused."""
    print(json.dumps(content, indent=2, allow_nan=False), flush=True)


def print_plain(text: object, style: str | None = None) -> None:
    """Lines as they are, without markup: whole in a pipe, where grep finds them, broken between words on a terminal.
    What is broken off goes on below the text, to the right of what the line is called."""
    lines = list(map(printable, str(text).split("\n")))
    if console.is_terminal:
        lines = [part for line in lines for part in _broken(line)]
    console.print("\n".join(lines), style=style, highlight=False, markup=False, soft_wrap=True)


def _broken(line: str) -> list[str]:
    name = re.match(r" *(?:\S.{0,20}?  +)?", line).group()
    indent = " " * len(name)
    return textwrap.wrap(
        line, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [line]


def table(*headings: str) -> Table:
    """A table whose cells go on in another line where the terminal is narrow: nothing is cut off."""
    made = Table()
    for heading in headings:
        made.add_column(heading, overflow="fold")
    return made


def cell(text: object) -> str:
    """Text for a table or a line with markup in it: whatever it holds, it is shown and does nothing."""
    return escape(printable(str(text)))
