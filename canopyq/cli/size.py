"""`canopyq size`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from canopyq.cli.shown import JsonFlag, console, print_json


def size(
    model: Annotated[str, typer.Argument(help="A number of parameters (7B, 350M) or a model (llama-3.1-8b).")],
    format: Annotated[str, typer.Option(help="Format of the weights.")] = "int4",
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; none: scales are not counted.")
    ] = None,
    asymmetric: Annotated[bool, typer.Option(help="Count zero points too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """How many bytes a model's weights take: codes, scales, total, and the other formats beside it."""
    from canopyq.formats import FORMATS, get_format
    from canopyq.memory import human, parameter_count, weight_bytes

    count, chosen = parameter_count(model), get_format(format).name
    rows = {chosen: weight_bytes(count, chosen, group_size, symmetric=not asymmetric)}
    for name, fmt in FORMATS.items():
        takes_groups = fmt.bits < 16 and name not in ("mxfp4", "nvfp4")
        integer = name.startswith("int")
        if name != chosen and name not in ("int7", "int6", "int5", "fp4_e2m1"):
            rows[name] = weight_bytes(
                count, name, group_size if takes_groups else None, symmetric=not (asymmetric and integer)
            )
    if as_json:
        formats = {name: {**vars(row), "total": row.total} for name, row in rows.items()}
        print_json({"model": model, "parameters": count, "group_size": group_size, "bytes": formats})
        return
    groups = f", groups of {group_size}" if group_size else ", one scale a row or tensor (not counted)"
    console.print(f"{count:,} weights{groups}", style="italic", highlight=False, soft_wrap=True)
    table = Table()
    for heading in ("format", "codes", "scales", *(["zero points"] if asymmetric else []), "total", "of FP32"):
        table.add_column(heading, overflow="fold")  # a narrow terminal gets more lines, and all of each number
    for name, row in sorted(rows.items(), key=lambda item: -item[1].total):
        share = f"{100 * row.total / (4 * count):.1f} %"
        parts = [row.codes, row.scales, *([row.zero_points] if asymmetric else [])]
        cells = [human(part) if part else "" for part in parts]
        table.add_row(name, *cells, human(row.total), share, style="bold green" if name == chosen else "")
    console.print(table)
    row = rows[chosen]
    extra = f" + {human(row.scales)} of scales" if row.scales else ""
    extra += f" + {human(row.zero_points)} of zero points" if row.zero_points else ""
    console.print(
        f"{chosen}: {human(row.codes)} of codes{extra} = [bold]{human(row.total)}[/]", highlight=False, soft_wrap=True
    )
