"""`canopyq inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from canopyq.cli.shown import JsonFlag, print_json, print_plain


def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder with config.json and safetensors.")],
    as_json: JsonFlag = False,
) -> None:
    """What a checkpoint holds, and which tools will load it."""
    from canopyq.checkpoint.inspect import inspect as look

    found = look(folder)
    if as_json:
        print_json(found.to_dict())
    else:
        print_plain(found)
