"""`canopyq advise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from canopyq.cli.shown import JsonFlag, print_json, print_plain


def advise(
    model: Annotated[str, typer.Option(help="A model (llama-3.1-8b), a size (7B), or a folder with a config.json.")],
    memory: Annotated[str | None, typer.Option(help="For weights and cache together, e.g. 8GB or 6.5GiB.")] = None,
    context: Annotated[str, typer.Option(help="Tokens of each chat's cache, e.g. 32k.")] = "0",
    batch: Annotated[int, typer.Option(help="Chats at a time.")] = 1,
    accuracy: Annotated[float, typer.Option(help="The least share of right answers.")] = 0.98,
    gpu: Annotated[str | None, typer.Option(help="A GPU (h100), a compute capability (8.9), or cpu.")] = None,
    priority: Annotated[str, typer.Option(help="accuracy, balanced, compression or throughput.")] = "balanced",
    measurements: Annotated[
        Path | None, typer.Option(help="A JSON file with measurements of your own; default: those of the tutor.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Recommend a recipe for a model, with its bytes and its measured quality.

    Where nothing meets the needs, say which of them has to give, and by how much.
    """
    from canopyq import advisor

    known = None if measurements is None else advisor.read(measurements)
    found = advisor.advise(
        model, memory=memory, context=context, batch=batch, accuracy=accuracy, gpu=gpu, priority=priority,
        measurements=known,
    )  # fmt: skip
    if as_json:
        print_json(found.to_dict())
    else:
        print_plain(found)
