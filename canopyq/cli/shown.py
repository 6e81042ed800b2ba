"""What every command shares: the console, the --json flag, and how JSON is printed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from canopyq.errors import CanopyError

console = Console()
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def check_device(device: str) -> str:
    """The device if torch can use it.

    Raises:
        CanopyError: if not, or if torch knows no such device.
    """
    import torch

    try:
        torch.empty(1, device=device).tolist()  # the meta device, too, refuses to give values
    except (RuntimeError, AssertionError) as error:
        raise CanopyError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}; use cpu") from None
    return device


def print_json(content: Any) -> None:
    """Valid JSON on stdout: NaN and infinity are refused."""
    print(json.dumps(content, indent=2, allow_nan=False), flush=True)


def print_plain(text: object, style: str | None = None) -> None:
    """Text as it is, without markup, and never broken by a narrow terminal."""
    console.print(str(text), style=style, highlight=False, markup=False, soft_wrap=True)
