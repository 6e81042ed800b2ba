"""`canopyq eval`."""

from __future__ import annotations

import math
from typing import Annotated

import typer

import canopyq as cq
from canopyq.cli.shown import JsonFlag, print_json, print_plain
from canopyq.errors import CanopyError, shown

MOST_QUESTIONS = 816  # of 17 skills, the one with the fewest held-out questions has 48


def evaluate(
    model: Annotated[
        str, typer.Argument(help="'tutor', the model that ships with canopyq, or a checkpoint of it.")
    ] = "tutor",
    recipe: Annotated[
        str | None, typer.Option(help="Quantize by this recipe and compare, e.g. w4a16-g128+kv4.")
    ] = None,
    questions: Annotated[int, typer.Option(help="How many held-out questions.", min=1, max=MOST_QUESTIONS)] = 510,
    seed: Annotated[int, typer.Option(help="Which questions are drawn.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Examine the tutor on held-out questions; with --recipe, before and after quantizing.

    A folder that `canopyq quantize` wrote is examined beside the original; with it goes a recipe of the cache alone,
    such as kv4. Static activations are calibrated on chats of the validation split, none of which is scored.
    """
    from canopyq.checkpoint.files import as_path
    from canopyq.cli.calibrated import quantize_tutor
    from canopyq.evaluate import compare, examine
    from canopyq.tutor.loading import TUTOR, VARIABLE, source

    saved = model != TUTOR and as_path(model).is_dir()
    if model != TUTOR and not saved:
        raise CanopyError(
            f"unknown model {shown(model)}; only 'tutor' goes here, or the folder of a checkpoint of it, and another "
            f"model takes its place by {VARIABLE}=<folder or hub id> canopyq eval tutor"
        )
    parsed = None if recipe is None else cq.Recipe.parse(recipe)
    cache = None if parsed is None else parsed.cache
    if saved and parsed is not None and parsed.weights is not None:
        raise CanopyError(
            f"{model} is quantized already; leave --recipe out or name a cache such as kv4, or use canopyq eval tutor"
        )
    asked = cq.tutor.questions(questions, seed=seed)
    original, tokenizer = cq.tutor.load()
    if saved:
        quantized = cq.load(model, original.device, original.dtype)
        result, report = compare(original, quantized, tokenizer, asked, cache=cache), None
    elif parsed is None:
        result, report = examine(original, tokenizer, asked), None
    elif parsed.weights is None:
        result, report = compare(original, original, tokenizer, asked, cache=cache), None
    else:
        quantized, _ = cq.tutor.load()
        report = quantize_tutor(quantized, tokenizer, parsed)
        result = compare(original, quantized, tokenizer, asked, cache=cache)
    if as_json:
        print_json(_eval_json(model if saved else source(), original, asked, result, report, cache))
        return
    if report is not None:
        print_plain(report)
    about = f"{model if saved else source()}: {len(asked)} held-out questions, 95 % intervals in brackets"
    print_plain(about, "dim")
    print_plain(result)


def _eval_json(examined: str, original, asked: list, result, report, cache: str | None) -> dict:
    out = {"examined": examined, "dtype": str(original.dtype).removeprefix("torch."), "questions": len(asked)}
    out |= {"cache": cache}
    if report is None:
        return out | result.to_dict()
    layers = [
        vars(layer) | {"sqnr_db": layer.sqnr_db if math.isfinite(layer.sqnr_db) else None} for layer in report.layers
    ]
    size = {"before": report.bytes_before, "after": report.bytes_after}
    size["bits_per_quantized_weight"] = sum(8 * x["bytes_after"] for x in layers) / sum(
        x["shape"][0] * x["shape"][1] for x in layers
    )
    about = {"layers": layers, "kept": report.kept, "notes": list(report.notes)}
    return out | {"recipe": report.recipe, "size": size} | result.to_dict() | about
