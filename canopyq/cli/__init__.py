"""The `canopyq` command. A mistake of the caller ends in one line on stderr and exit code 2."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from canopyq import __version__
from canopyq.cli import course, export, quantize
from canopyq.cli.examine import chat, evaluate, explain
from canopyq.cli.facts import advise, bench, doctor, inspect, size, tune
from canopyq.errors import CanopyError, printable

app = typer.Typer(
    help="Quantize language models, measure what it cost, and learn why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor)
app.command()(size)
app.command("eval")(evaluate)
app.command()(chat)
app.command()(explain)
app.command()(quantize.quantize)
app.command()(export.export)
app.command()(course.course)
app.command()(inspect)
app.command()(bench)
app.command()(tune)
app.command()(advise)


def show_version(asked: bool) -> None:
    if asked:
        print(f"canopyq {__version__}", flush=True)  # so that output that cannot be written is an error of ours
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What may stand before a command."""


def main() -> None:
    """Run the command; a mistake, or output that cannot be written, becomes one line and exit code 2."""
    for stream in (sys.stdin, sys.stdout):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # "?" for what the terminal cannot show, or nobody can read
    warnings.showwarning = _show_warning
    try:
        app()
    except (CanopyError, OSError) as error:
        if sys.stderr is not None:
            print(f"canopyq: {printable(str(error))}", file=sys.stderr)
        if isinstance(error, OSError):
            sys.stdout = None  # Python would try once more to write what is left in it
        sys.exit(2)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning is a line too: without the file and the line of code that Python adds."""
    if sys.stderr is not None:
        print(f"canopyq: {printable(str(message))}", file=sys.stderr)
