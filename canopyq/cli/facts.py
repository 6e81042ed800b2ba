"""What can be told without running a model: `canopyq doctor`, `size`, `inspect`, `advise`, `bench`, `tune`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

import canopyq as cq
from canopyq.cli.output import JsonFlag, cell, console, print_json, print_plain, table
from canopyq.errors import CanopyError, shown


def doctor(as_json: JsonFlag = False) -> None:
    """Say what this machine has, and what of the course runs on it."""
    from canopyq.evaluate.machine import checks, describe

    machine, found = describe(), checks()
    if as_json:
        print_json({"machine": machine, "checks": [vars(check) for check in found]})
    else:
        print_plain(f"canopyq {cq.__version__}", "italic")
        found_here = table("what", "found")
        for name, value in machine.items():
            found_here.add_row(name, cell(value))
        console.print(found_here)
        for check in found:
            print_plain(f"{'ok' if check.ok else 'no'}  {check.name}: {check.detail}", "green" if check.ok else "red")
    if not all(check.ok for check in found if check.needed):
        raise typer.Exit(1)


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
    from canopyq.memory import human, parameter_count, weight_bytes
    from canopyq.tensor.formats import FORMATS, get_format

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
    print_plain(f"{count:,} weights{groups}", "italic")
    sizes = table("format", "codes", "scales", *(["zero points"] if asymmetric else []), "total", "of FP32")
    for name, row in sorted(rows.items(), key=lambda item: -item[1].total):
        share = f"{100 * row.total / (4 * count):.1f} %"
        parts = [row.codes, row.scales, *([row.zero_points] if asymmetric else [])]
        cells = [human(part) if part else "" for part in parts]
        sizes.add_row(name, *cells, human(row.total), share, style="bold green" if name == chosen else "")
    console.print(sizes)
    row = rows[chosen]
    extra = f" + {human(row.scales)} of scales" if row.scales else ""
    extra += f" + {human(row.zero_points)} of zero points" if row.zero_points else ""
    print_plain(f"{chosen}: {human(row.codes)} of codes{extra} = {human(row.total)}")


def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder with config.json and safetensors.")],
    tp: Annotated[int, typer.Option(help="GPUs that a server splits each layer over: can these be split so?")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """What a checkpoint holds, and which tools will load it."""
    from canopyq.checkpoint.inspect import inspect as look

    found = look(folder, tp)
    if as_json:
        print_json(found.to_dict())
    else:
        print_plain(found)


def advise(
    model: Annotated[str, typer.Option(help="A model (llama-3.1-8b), a size (7B), or a folder with a config.json.")],
    memory: Annotated[str | None, typer.Option(help="For weights and cache together, e.g. 8GB or 6.5GiB.")] = None,
    context: Annotated[str, typer.Option(help="Tokens of each chat's cache, e.g. 32k.")] = "0",
    batch: Annotated[int, typer.Option(help="Chats at a time.")] = 1,
    accuracy: Annotated[
        float | None, typer.Option(help="The least share of right answers; 0.98 where this model's were counted.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="A GPU (h100), a compute capability (8.9), or cpu.")] = None,
    priority: Annotated[str, typer.Option(help="accuracy, balanced, compression or throughput.")] = "balanced",
    server: Annotated[str | None, typer.Option(help="vllm: only what vLLM runs.")] = None,
    measurements: Annotated[
        Path | None, typer.Option(help="A JSON file with measurements of this model; default: those of the tutor.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Measure recipes on this text first, a file or a folder of them.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Recommend a recipe for a model, with its bytes and, where it was measured on this model, its quality.

    For any model but the tutor that takes --text, with --model as the model's folder: the model is loaded, and
    quantized by each recipe that fits it, in twice the memory that it takes in float32.

    Where nothing meets the needs, say which of them has to give, and by how much.
    """
    from canopyq import advisor

    if text is not None and measurements is not None:
        raise CanopyError("--text measures anew, and --measurements names what was measured; leave one of them out")
    if text is not None:
        if accuracy is not None:
            raise CanopyError(f"--accuracy {accuracy:g} is a share of right answers, and a text has none; leave it out")
        known = _measured(model, text)
    else:
        known = None if measurements is None else advisor.read(measurements)
    found = advisor.advise(
        model, memory=memory, context=context, batch=batch, accuracy=accuracy, gpu=gpu, priority=priority,
        server=server, measurements=known,
    )  # fmt: skip
    if as_json:
        print_json(found.to_dict())
    else:
        print_plain(found)


def _measured(model: str, text: Path) -> list[cq.advisor.Measurement]:
    """The recipes that fit the model in a folder, measured on a text."""
    from canopyq.checkpoint.files import Checkpoint, as_path
    from canopyq.cli.named import is_quantized, load_named
    from canopyq.evaluate.texts import read_texts

    texts, folder = read_texts(text), as_path(model)
    if model != "tutor" and not folder.is_dir():
        raise CanopyError(f"{shown(model)} is no folder with a model; --text measures one that lies on this machine")
    if model != "tutor" and is_quantized(Checkpoint(folder)):
        raise CanopyError(f"{folder} is quantized already; name the model that it was made from")
    return cq.advisor.measure(*load_named(model), texts, source=str(text))


def bench(
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe to time; may be given several times.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU, if there is one.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Time quantized linear layers on this machine beside the unquantized one. Takes a minute or less."""
    import torch

    from canopyq.evaluate.bench import bench as run
    from canopyq.evaluate.machine import describe

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    timed = run(tuple(recipe or ("w4a16-g128", "w8a16")), place)
    if as_json:
        results = [vars(x) | {"speedup": x.speedup} for x in timed]
        print_json({"machine": describe(), "device": place, "results": results})
        return
    plain = "bfloat16" if place.startswith("cuda") else "float32"
    for (inputs, outputs, name), rows in groupby(timed, lambda x: (x.inputs, x.outputs, x.recipe)):
        print_plain(f"{inputs}→{outputs}, {name}", "italic")
        times = table("rows", "µs", f"{plain} µs", "faster", "error", "kernel")
        for x in rows:
            numbers = f"{x.us:.1f}", f"{x.unquantized_us:.1f}", f"{x.speedup:.2f}×", f"{x.error:.1g}"
            times.add_row(str(x.rows), *numbers, cell(x.kernel))
        console.print(times)


def tune(
    model: Annotated[
        str | None, typer.Argument(help="Tune for the layers of a model (llama-3.1-8b) or a folder with a config.json.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="w4a16-g128, w8a16, w8a8 or fp8; may be given several times.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(help="A number of tokens; may be given several times.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure which kernels are the fastest on this GPU, and keep the result for all later runs. Takes minutes."""
    from canopyq.advisor.needs import find_shape
    from canopyq.evaluate import tune as tuning

    shapes = tuning.SHAPES if model is None else tuning.shapes_of(find_shape(model)[1])
    found = tuning.tune(shapes, tuple(recipe or ("w4a16-g128", "w8a16")), tuple(rows or tuning.ROWS))
    if as_json:
        print_json({"gain": tuning.gain(found), "results": [vars(one) for one in found]})
        return
    better = [one for one in found if one.before > 1.02 * one.after]
    for (k, n, name), some in groupby(better, lambda one: (one.k, one.n, one.recipe)):
        print_plain(f"{k}→{n}, {name}", "italic")
        times = table("rows", "µs before", "µs", "faster", "kernel")
        for one in some:
            numbers = f"{one.before:.1f}", f"{one.after:.1f}", f"{one.before / one.after:.2f}×"
            times.add_row(str(one.rows), *numbers, cell(one.kernel))
        console.print(times)
    words = f"{len(found)} products measured, {len(better)} of them more than 2 % faster now"
    print_plain(f"{words}, {tuning.gain(found):.3f}× in the mean")
