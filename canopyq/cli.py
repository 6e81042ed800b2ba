"""The `canopyq` command. A mistake of the caller ends in one line on stderr and exit code 2."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.formats import FORMATS, get_format
from canopyq.memory import human, parameter_count, weight_bytes
from canopyq.scheme import Recipe

app = typer.Typer(
    help="Quantize language models, measure what it cost, and learn why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
MOST_QUESTIONS = 816  # of 17 skills, the one with the fewest held-out questions has 48
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Say what this machine has, and what of the course runs on it."""
    from canopyq.machine import checks, describe

    machine, found = describe(), checks()
    if as_json:
        _print_json({"machine": machine, "checks": [vars(check) for check in found]})
    else:
        table = Table("what", "found", title=f"canopyq {cq.__version__}", title_justify="left")
        for name, value in machine.items():
            table.add_row(name, escape(str(value)))
        console.print(table)
        for check in found:
            verdict = "[green]ok [/]" if check.ok else "[red]no [/]"
            console.print(f"{verdict} {escape(f'{check.name}: {check.detail}')}", highlight=False, soft_wrap=True)
    if not all(check.ok for check in found if check.needed):
        raise typer.Exit(1)


@app.command()
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
        _print_json({"model": model, "parameters": count, "group_size": group_size, "bytes": formats})
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


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="'tutor', the model that ships with canopyq.")] = "tutor",
    recipe: Annotated[str | None, typer.Option(help="Quantize by this recipe and compare, e.g. w4a16-g128.")] = None,
    questions: Annotated[int, typer.Option(help="How many held-out questions.", min=1, max=MOST_QUESTIONS)] = 510,
    seed: Annotated[int, typer.Option(help="Which questions are drawn.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Examine the tutor on held-out questions; with --recipe, before and after quantizing."""
    from canopyq.evaluate import compare, examine
    from canopyq.tutor.loading import TUTOR, VARIABLE, source

    if model != TUTOR:
        raise CanopyError(
            f"unknown model {model!r}; only 'tutor' goes here, and another one takes its place by "
            f"{VARIABLE}=<folder or hub id> canopyq eval tutor"
        )
    parsed = None if recipe is None else Recipe.parse(recipe)
    asked = cq.tutor.questions(questions, seed=seed)
    original, tokenizer = cq.tutor.load()
    if parsed is None:
        result, report = examine(original, tokenizer, asked), None
    else:
        quantized, _ = cq.tutor.load()
        report = cq.quantize_(quantized, parsed)
        result = compare(original, quantized, tokenizer, asked)
    if as_json:
        _print_json(_eval_json(source(), original, asked, result, report))
        return
    if report is not None:
        console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    about = f"{source()}: {len(asked)} held-out questions, 95 % intervals in brackets"
    console.print(about, style="dim", highlight=False, markup=False, soft_wrap=True)
    console.print(str(result), highlight=False, markup=False, soft_wrap=True)


def _eval_json(examined: str, original, asked: list, result, report) -> dict:
    out = {"examined": examined, "dtype": str(original.dtype).removeprefix("torch."), "questions": len(asked)}
    if report is None:
        return out | result.to_dict()
    layers = [
        vars(layer) | {"sqnr_db": layer.sqnr_db if math.isfinite(layer.sqnr_db) else None} for layer in report.layers
    ]
    size = {"before": report.bytes_before, "after": report.bytes_after}
    size["bits_per_quantized_weight"] = sum(8 * x["bytes_after"] for x in layers) / sum(
        x["shape"][0] * x["shape"][1] for x in layers
    )
    return out | {"recipe": report.recipe, "size": size} | result.to_dict() | {"layers": layers, "kept": report.kept}


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, allow_nan=False), flush=True)


def main() -> None:
    """Run the command; a mistake, or output that cannot be written, becomes one line and exit code 2."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # "?" for what the terminal cannot show
    try:
        app()
    except (CanopyError, OSError) as error:
        print(f"canopyq: {error}", file=sys.stderr)
        if isinstance(error, OSError):
            sys.stdout = None  # Python would try once more to write what is left in it
        sys.exit(2)


if __name__ == "__main__":
    main()
