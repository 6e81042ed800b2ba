"""`canopyq bench`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from canopyq.cli.shown import JsonFlag, cell, check_device, console, print_json


def bench(
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe to time; may be given several times.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU, if there is one.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Time quantized linear layers on this machine beside the unquantized one. Takes a minute or less."""
    import torch

    from canopyq.bench import bench as run
    from canopyq.machine import describe

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    check_device(place)
    timed = run(tuple(recipe or ("w4a16-g128", "w8a16")), place)
    if as_json:
        results = [vars(x) | {"speedup": x.speedup} for x in timed]
        print_json({"machine": describe(), "device": place, "results": results})
        return
    plain = "bfloat16" if place.startswith("cuda") else "float32"
    table = Table("layer", "recipe", "rows", "µs", f"{plain} µs", "faster", "error", "kernel")
    for x in timed:
        cells = [f"{x.inputs}→{x.outputs}", cell(x.recipe), str(x.rows), f"{x.us:.1f}", f"{x.unquantized_us:.1f}"]
        table.add_row(*cells, f"{x.speedup:.2f}×", f"{x.error:.1g}", cell(x.kernel))
    console.print(table)
