"""`canopyq quantize`."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from canopyq.cli.named import RevisionOption, folder_of, is_gguf
from canopyq.cli.output import JsonFlag, print_json, print_plain
from canopyq.errors import CanopyError

if TYPE_CHECKING:
    from canopyq.cli.calibrated import Amount
    from canopyq.methods.registry import Method
    from canopyq.tensor.scheme import Recipe


def quantize(
    model: Annotated[
        str,
        typer.Argument(help="A folder with safetensors, a GGUF file, a model of the hub (owner/name), or 'tutor'."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet, or be empty.")],
    recipe: Annotated[str, typer.Option(help="How to quantize, e.g. w4a16-g128, w8a16.")] = "w4a16-g128",
    method: Annotated[
        str, typer.Option(help="How to round: rtn, clip, gptq, awq, hqq, smoothquant, rotation; rotation+gptq …")
    ] = "rtn",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="For static recipes and methods that need data: a file of text, or a folder of such files; of "
            "file.jsonl:field that field."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Windows of the text to calibrate on, or chats of the tutor's.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of each of them.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A layer, or a dotted part of its name, to keep as it is; give it again.")
    ] = None,
    observer: Annotated[
        str | None,
        typer.Option(
            help="How ranges are chosen, of inputs where they are fixed and else of weights: minmax, percentile, mse …"
        ),
    ] = None,
    revision: RevisionOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Quantize a checkpoint from disk to disk, in the memory of one layer.

    Started again after an interruption, it continues. A recipe with static activations, and any method but rounding to
    nearest, takes the whole model in memory instead: it is calibrated on text of yours, and 'tutor' on chats of its
    own. A model of the hub is fetched to the hub's cache first. One that was published in FP8 or MXFP4 is dequantized.
    """
    from canopyq.checkpoint.files import as_path
    from canopyq.checkpoint.stream import prepare, quantize_checkpoint
    from canopyq.cli.calibrated import Amount
    from canopyq.methods.registry import Method
    from canopyq.tensor.scheme import Recipe

    say = (lambda line: None) if as_json else print_plain
    out, more = as_path(out), "continues"
    try:
        parsed, how = _with_options(Recipe.parse(recipe), ignore, observer), Method.parse(method)
        amount = Amount(samples, length)
        gguf = is_gguf(model) and revision is None
        folder = Path(model) if gguf else folder_of(model, revision)
        if gguf or parsed.static or how.name != "rtn":
            more = "starts over"
            _in_memory(model, folder, parsed, how, out, calibration, amount, dry_run, as_json)
            return
        if calibration is not None or amount != Amount():
            raise CanopyError(f"{parsed.name} needs no calibration; leave --calibration, --samples and --length out")
        if dry_run:
            plan, _ = prepare(folder, parsed, out, say=say)
            resumed = 0
        else:
            done = quantize_checkpoint(folder, parsed, out, say=say)
            plan, resumed = done.plan, done.resumed
    except KeyboardInterrupt:
        print(f"canopyq: interrupted; {out} was not made; the same command {more}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        size = {"before": plan.bytes_before, "after": plan.bytes_after, "peak": plan.peak_bytes}
        print_json(
            {"source": str(folder), "out": None if dry_run else str(out), "recipe": plan.recipe.name, "bytes": size,
             "layers": [step.layer.name for step in plan.quantized], "kept": plan.kept, "left_out": plan.dropped,
             "files": list(plan.shards), "files_finished_before": resumed}
        )  # fmt: skip
    elif not dry_run:
        print_plain(f"written to {out}")


def _with_options(recipe: Recipe, ignore: list[str] | None, observer: str | None) -> Recipe:
    """A recipe with more layers that stay as they are, and another observer."""
    if ignore:
        recipe = replace(recipe, ignore=(*recipe.ignore, *ignore))
    if observer is not None:
        part = "activations" if recipe.static else "weights"
        if getattr(recipe, part) is None:
            raise CanopyError(f"{recipe.name} quantizes no weights, and so chooses no ranges; leave --observer out")
        recipe = replace(recipe, **{part: replace(getattr(recipe, part), observer=observer)})
    return recipe


def _in_memory(
    model: str,
    folder: Path,
    recipe: Recipe,
    method: Method,
    out: Path,
    texts: Path | None,
    amount: Amount,
    dry_run: bool,
    as_json: bool,
) -> None:
    import torch

    import canopyq as cq
    from canopyq.checkpoint.derived import dequantized
    from canopyq.checkpoint.files import Checkpoint
    from canopyq.checkpoint.groups import check_recipe
    from canopyq.checkpoint.plan import meta_model
    from canopyq.cli.calibrated import dtype_on_disk, quantize_in_memory
    from canopyq.tutor.loading import TUTOR, load_other

    method.check(recipe)
    check_recipe(recipe, method)
    if is_gguf(model):
        loaded = cq.load_gguf(model)
        planned, read, dtype = loaded[0], lambda: loaded, torch.float16  # which the blocks of GGUF are made of
    else:
        source = Checkpoint(folder)
        dequantized(source)  # or it says why it cannot be a source
        planned, dtype = meta_model(source), dtype_on_disk(source)
        read = cq.tutor.load if model == TUTOR else partial(load_other, folder, type(planned))
    plan = cq.plan(planned, recipe)
    if dry_run:
        done, notes = plan, ()
    else:
        done = quantize_in_memory(model, read, dtype, recipe, method, out, texts, amount)
        notes = done.notes
    if as_json:
        size = {"before": plan.bytes_before, "after": plan.bytes_after, "peak": plan.bytes_peak}
        print_json(
            {"source": str(folder), "out": None if dry_run else str(out), "recipe": recipe.name,
             "method": method.name, "bytes": size, "layers": list(plan.layers), "kept": plan.kept, "notes": list(notes)}
        )  # fmt: skip
        return
    print_plain(done)
    if not dry_run:
        print_plain(f"written to {out}")
