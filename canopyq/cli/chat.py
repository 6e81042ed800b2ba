"""`canopyq chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import canopyq as cq
from canopyq.cli.shown import cell, console, print_plain
from canopyq.errors import CanopyError, shown

if TYPE_CHECKING:
    from canopyq.conversation import Conversation

BAR = 30  # characters of the longer bar


def chat(
    model: Annotated[
        str, typer.Argument(help="'tutor', the model that ships with canopyq, or the folder of a checkpoint of it.")
    ] = "tutor",
    recipe: Annotated[
        str | None, typer.Option(help="Quantize by this recipe, e.g. w4a16-g128+kv4; for a checkpoint a cache: kv4.")
    ] = None,
) -> None:
    """Chat with the tutor, and see after each turn what its weights and its KV cache take.

    /new starts a new chat; /quit or end of input (Ctrl-D) ends. Questions may come from a pipe, one a line.
    """
    from canopyq.conversation import Conversation
    from canopyq.memory import human

    parsed = None if recipe is None else cq.Recipe.parse(recipe)
    talk = Conversation(*_load(model, parsed), parsed and parsed.cache)
    name = f"{model}{'' if parsed is None else f', {parsed.name}'}"
    print_plain(f"{name}: {human(talk.weight_bytes)} of weights, up to {talk.limit:,} tokens; /new, /quit", "dim")
    try:
        while (line := _read()) is not None:
            if line == "/quit":
                break
            if line == "/new":
                talk.restart()
                print_plain("a new chat: the cache is empty", "dim")
            elif line.startswith("/"):
                print_plain(f"there is no {line}; /new starts a new chat, /quit ends this one", "red")
            elif line:
                _turn(talk, line)
    except KeyboardInterrupt:
        print_plain("")


def _load(model: str, recipe: cq.Recipe | None):
    """The model, quantized as the recipe says, and its tokenizer."""
    from canopyq.checkpoint.files import as_path

    if model != "tutor":
        if not as_path(model).is_dir():
            raise CanopyError(
                f"unknown model {shown(model)}; chat with 'tutor', or with the folder of a checkpoint of it"
            )
        if recipe is not None and recipe.weights is not None:
            raise CanopyError(f"{model} is quantized already; leave --recipe out, or name a cache such as kv4")
        _, tokenizer = cq.tutor.load()
        return cq.load(model), tokenizer
    loaded, tokenizer = cq.tutor.load()
    if recipe is not None and recipe.weights is not None:
        from canopyq.cli.calibrated import quantize_tutor

        quantize_tutor(loaded, tokenizer, recipe)
    return loaded, tokenizer


def _read() -> str | None:
    """The next line without the blanks around it; None at the end of the input."""
    try:
        if sys.stdin is None:  # closed by who started the command
            return None
        if sys.stdin.isatty():
            return input("you> ").strip()
        line = input().strip()
        print_plain(f"you> {line}")
        return line
    except EOFError:
        if sys.stdin.isatty():
            print_plain("")
        return None


def _turn(talk: Conversation, question: str) -> None:
    try:
        answer = talk.ask(question)
    except CanopyError as error:
        print_plain(f"{error}: type /new", "red")
        return
    console.print(f"[bold green]tutor>[/] {cell(answer)}", highlight=False, soft_wrap=True)
    console.print(_bars(talk))


def _bars(talk: Conversation) -> Table:
    """Weights and cache on one scale."""
    from canopyq.memory import human

    weights, cache = talk.weight_bytes, talk.cache_bytes
    kind = getattr(talk.cache, "format", None)
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), style="dim")
    for name, size, note in (
        ("weights", weights, ""),
        ("cache", cache, f"{kind.name if kind else 'not quantized'}, {talk.tokens:,} of {talk.limit:,} tokens"),
    ):
        bar = "█" * max(1, round(BAR * size / max(weights, cache)))
        table.add_row(name, f"[{'yellow' if name == 'cache' else 'blue'}]{bar}[/]", human(size), note)
    return table
