"""`canopyq explain`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

import canopyq as cq
from canopyq.cli.shown import JsonFlag, cell, check_device, console, print_json


def explain(
    model: Annotated[str, typer.Argument(help="'tutor', or a folder with a quantized checkpoint.")] = "tutor",
    recipe: Annotated[str, typer.Option(help="For 'tutor': the recipe to quantize it by.")] = "w4a16-g128",
    device: Annotated[str, typer.Option(help="Where the model would run: cpu or cuda.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Say which kernel runs each quantized layer on this machine, and why each other one does not."""
    from canopyq.cli.calibrated import quantize_tutor

    check_device(device)
    if model == "tutor":
        parsed = cq.Recipe.of_weights(recipe)
        loaded, tokenizer = cq.tutor.load()
        quantize_tutor(loaded, tokenizer, parsed, chats=2)  # which kernel runs does not depend on the ranges
        loaded.to(device)
    else:
        loaded = cq.load(model, device=device)
    found = cq.explain(loaded)
    if as_json:
        layers = [
            {"name": x.name, "shape": x.shape, "scheme": x.scheme, "bytes": x.nbytes, "device": x.device}
            | {"runs": x.runs, "refused": x.refused}
            for x in found.layers
        ]
        print_json({"layers": layers})
        return
    for title, first in found.groups().items():
        table = Table("kernel", "runs for", "or why not", title=cell(title), title_justify="left")
        for kernel, rows in first.runs.items():
            table.add_row(cell(kernel), cell(rows), "", style="bold green")
        for kernel, reason in first.refused.items():
            table.add_row(cell(kernel), "", cell(reason))
        console.print(table)
