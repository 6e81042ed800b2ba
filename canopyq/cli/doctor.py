"""`canopyq doctor`."""

from __future__ import annotations

import typer
from rich.table import Table

import canopyq as cq
from canopyq.cli.shown import JsonFlag, cell, console, print_json


def doctor(as_json: JsonFlag = False) -> None:
    """Say what this machine has, and what of the course runs on it."""
    from canopyq.machine import checks, describe

    machine, found = describe(), checks()
    if as_json:
        print_json({"machine": machine, "checks": [vars(check) for check in found]})
    else:
        table = Table("what", "found", title=f"canopyq {cq.__version__}", title_justify="left")
        for name, value in machine.items():
            table.add_row(name, cell(value))
        console.print(table)
        for check in found:
            verdict = "[green]ok [/]" if check.ok else "[red]no [/]"
            console.print(f"{verdict} {cell(f'{check.name}: {check.detail}')}", highlight=False, soft_wrap=True)
    if not all(check.ok for check in found if check.needed):
        raise typer.Exit(1)
