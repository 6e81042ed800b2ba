"""What a model does: `canopyq eval`, `canopyq chat`, `canopyq explain`."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import canopyq as cq
from canopyq.cli.output import JsonFlag, cell, console, print_json, print_plain
from canopyq.errors import CanopyError, shown

if TYPE_CHECKING:
    from pathlib import Path

    from canopyq.evaluate.chat import Conversation

MOST_QUESTIONS = 816  # of 17 skills, the one with the fewest held-out questions has 48
BAR = 30  # characters of the longer bar


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
    from canopyq.evaluate.quality import compare, examine
    from canopyq.kv_cache import cache_of
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
        _require_checkpoint_of(original, tokenizer, as_path(model), source())
        quantized = cq.load(model, original.device, original.dtype)
        cache = cache_of(quantized.config) if parsed is None else cache
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


def _require_checkpoint_of(original, tokenizer, folder: Path, name: str) -> None:
    """Refuse to compare a checkpoint with a model that it was not made from."""
    from canopyq.checkpoint.files import Checkpoint
    from canopyq.checkpoint.skeleton import read_model_config
    from canopyq.tutor.loading import VARIABLE, has_tokenizer, load_tokenizer

    checkpoint = Checkpoint(folder)
    config = read_model_config(folder, checkpoint.config, len(checkpoint.tensors))
    sizes = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
    differ = [size for size in sizes if getattr(config, size, None) != getattr(original.config, size, None)]
    if not differ and has_tokenizer(folder) and load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        differ = ["tokens"]
    if differ:
        raise CanopyError(
            f"{folder} is not made from {name} (another {differ[0]}); name its original: "
            f"{VARIABLE}=<folder or hub id> canopyq eval {folder}"
        )


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


def chat(
    model: Annotated[
        str, typer.Argument(help="'tutor', the model that ships with canopyq, or a folder with a quantized chat model.")
    ] = "tutor",
    recipe: Annotated[
        str | None, typer.Option(help="Quantize by this recipe, e.g. w4a16-g128+kv4; for a checkpoint a cache: kv4.")
    ] = None,
) -> None:
    """Chat with the tutor, or with a quantized model, and see after each turn what weights and KV cache take.

    /new starts a new chat; /quit or end of input (Ctrl-D) ends. Questions may come from a pipe, one a line.
    """
    from canopyq.evaluate.chat import Conversation
    from canopyq.kv_cache import cache_of
    from canopyq.memory import human

    parsed = None if recipe is None else cq.Recipe.parse(recipe)
    loaded, tokenizer = _load(model, parsed)
    cache = cache_of(loaded.config) if parsed is None else parsed.cache
    talk = Conversation(loaded, tokenizer, cache)
    name = f"{model}{'' if parsed is None else f', {parsed.name}'}"
    most = "" if talk.limit is None else f", up to {talk.limit:,} tokens"
    print_plain(f"{name}: {human(talk.weight_bytes)} of weights{most}; /new, /quit", "dim")
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
                _turn(talk, line, "tutor" if model == "tutor" else "model")
    except KeyboardInterrupt:
        print_plain("")


def _load(model: str, recipe: cq.Recipe | None):
    """The model, quantized as the recipe says, and its own tokenizer."""
    from canopyq.checkpoint.files import as_path
    from canopyq.tutor.loading import load_tokenizer

    if model != "tutor":
        if not as_path(model).is_dir():
            raise CanopyError(
                f"unknown model {shown(model)}; chat with 'tutor', or with the folder of a quantized checkpoint"
            )
        if recipe is not None and recipe.weights is not None:
            raise CanopyError(f"{model} is quantized already; leave --recipe out, or name a cache such as kv4")
        tokenizer = load_tokenizer(as_path(model))
        if not tokenizer.chat_template:
            raise CanopyError(
                f"the tokenizer of {model} has no chat template, so nothing says how a chat with it is written; save "
                "the checkpoint with the tokenizer of a chat model"
            )
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


def _turn(talk: Conversation, question: str, who: str) -> None:
    try:
        answer = talk.ask(question)
    except CanopyError as error:
        print_plain(f"{error}: type /new", "red")
        return
    console.print(f"[bold green]{who}>[/] {cell(answer)}", highlight=False, soft_wrap=True)
    console.print(_bars(talk))


def _bars(talk: Conversation) -> Table:
    """Weights and cache on one scale."""
    from canopyq.memory import human

    weights, cache = talk.weight_bytes, talk.cache_bytes
    kind = getattr(talk.cache, "format", None)
    tokens = f"{talk.tokens:,}" + ("" if talk.limit is None else f" of {talk.limit:,}")
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), style="dim")
    for name, size, note in (
        ("weights", weights, ""),
        ("cache", cache, f"{kind.name if kind else 'not quantized'}, {tokens} tokens"),
    ):
        bar = "█" * max(1, round(BAR * size / max(weights, cache)))
        table.add_row(name, f"[{'yellow' if name == 'cache' else 'blue'}]{bar}[/]", human(size), note)
    return table


def explain(
    model: Annotated[str, typer.Argument(help="'tutor', or a folder with a quantized checkpoint.")] = "tutor",
    recipe: Annotated[str, typer.Option(help="For 'tutor': the recipe to quantize it by.")] = "w4a16-g128",
    device: Annotated[str, typer.Option(help="Where the model would run: cpu or cuda.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Say which kernel runs each quantized layer on this machine, and why each other one does not."""
    from canopyq import checks
    from canopyq.cli.calibrated import quantize_tutor

    checks.device(device)
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
