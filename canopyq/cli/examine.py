"""What a model does: `canopyq eval`, `canopyq chat`, `canopyq explain`."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import canopyq as cq
from canopyq.cli.named import RevisionOption, load_named
from canopyq.cli.output import JsonFlag, cell, console, print_json, print_plain, table
from canopyq.errors import CanopyError, shown

if TYPE_CHECKING:
    from canopyq.evaluate.chat import Conversation
    from canopyq.methods.registry import Method
    from canopyq.model.report import Report

TOKENS = 8192  # what text_quality takes too, which needs torch to be loaded
MOST_QUESTIONS = 816  # of 17 skills, the one with the fewest held-out questions has 48
BAR = 20  # characters of the longer bar


def evaluate(
    model: Annotated[
        str, typer.Argument(help="'tutor', or a checkpoint of it; with --text any folder, or a model of the hub.")
    ] = "tutor",
    recipe: Annotated[
        str | None, typer.Option(help="Quantize by this recipe and compare, e.g. w4a16-g128+kv4.")
    ] = None,
    method: Annotated[str, typer.Option(help="How --recipe rounds: rtn, gptq, awq …; as canopyq quantize.")] = "rtn",
    calibration: Annotated[
        Path | None, typer.Option(help="Text for methods and static recipes that need it: a file or folder.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Examine on this text, a file or a folder of them, instead of on questions.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="With --text: how many of its tokens.", min=2)] = TOKENS,
    length: Annotated[int | None, typer.Option(help="With --text: tokens of a window.", min=2)] = None,
    original: Annotated[
        str | None, typer.Option(help="With --text: the model that a quantized one was made from, to compare with.")
    ] = None,
    revision: RevisionOption = None,
    questions: Annotated[int, typer.Option(help="How many held-out questions.", min=1, max=MOST_QUESTIONS)] = 510,
    seed: Annotated[int, typer.Option(help="Which questions are drawn.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Examine the tutor on held-out questions, or any model on a text; with --recipe, before and after quantizing.

    A folder that `canopyq quantize` wrote is examined beside the original; with it goes a recipe of the cache alone,
    such as kv4. Static activations are calibrated on chats of the validation split, none of which is scored.

    With --text any causal language model is examined: perplexity, and beside an original KL divergence and how often
    both find the same token most likely, each with a 95 % interval.
    """
    from canopyq.methods.registry import Method

    parsed = None if recipe is None else cq.Recipe.parse(recipe)
    how = Method.parse(method)
    if (how.name != "rtn" or calibration is not None) and (parsed is None or parsed.weights is None):
        raise CanopyError(
            "--method and --calibration say how --recipe quantizes weights; name a recipe such as w4a16-g128"
        )
    if text is not None:
        _evaluate_text(model, parsed, how, calibration, text, tokens, length, original, revision, as_json)
        return
    if original is not None or revision is not None:
        raise CanopyError("--original and --revision go with --text: name a file of text, or a folder of such files")
    _evaluate_questions(model, parsed, how, calibration, questions, seed, as_json)


def _evaluate_text(
    model: str,
    recipe: cq.Recipe | None,
    method: Method,
    calibration: Path | None,
    text: Path,
    tokens: int,
    length: int | None,
    original: str | None,
    revision: str | None,
    as_json: bool,
) -> None:
    from canopyq.cli.calibrated import check_calibration, quantize_loaded
    from canopyq.evaluate.text_quality import compare_text, examine_text
    from canopyq.evaluate.texts import read_texts
    from canopyq.kv_cache import cache_of
    from canopyq.memory import human, peak_bytes
    from canopyq.nn.linear import quantized_layers

    read = read_texts(text)
    cache = None if recipe is None else recipe.cache
    quantizes = recipe is not None and recipe.weights is not None
    if quantizes:
        check_calibration(model, recipe, method, calibration)
        if original is not None:
            raise CanopyError(f"--recipe {recipe.name} makes the quantized model itself; leave --original out")
    loaded, tokenizer = load_named(model, revision)
    if recipe is None:
        cache = cache_of(loaded.config)
    if quantizes and next(quantized_layers(loaded), None) is not None:
        raise CanopyError(f"{model} is quantized already; leave --recipe out or name a cache such as kv4")
    report = None
    options = {"tokens": tokens, "length": length}
    if quantizes:
        reference = copy.deepcopy(loaded)
        report = quantize_loaded(model, loaded, tokenizer, recipe, method, calibration)
    else:
        reference = loaded if original is None and cache is not None else None
        if original is not None:
            reference, tokenizer = load_named(original)
    if reference is None:
        result = examine_text(loaded, tokenizer, read, **options)
    else:
        result = compare_text(reference, loaded, tokenizer, read, cache=cache, **options)
    if as_json:
        out = {"examined": model, "original": original, "text": str(text), "cache": cache}
        out |= {"dtype": str(loaded.dtype).removeprefix("torch."), "method": method.name}
        print_json(out | result.to_dict() | {"peak_bytes": peak_bytes()} | _report_json(report))
        return
    if report is not None:
        print_plain(report)
    print_plain(f"{model} on {text}", "dim")
    print_plain(result)
    if original is None and not quantizes and next(quantized_layers(loaded), None) is not None:
        print_plain("what quantizing cost is told beside the model it was made from: name it by --original", "dim")
    print_plain(f"peak memory {human(peak_bytes())}", "dim")


def _evaluate_questions(
    model: str,
    recipe: cq.Recipe | None,
    method: Method,
    calibration: Path | None,
    questions: int,
    seed: int,
    as_json: bool,
) -> None:
    from canopyq.checkpoint.files import as_path
    from canopyq.cli.calibrated import quantize_loaded
    from canopyq.evaluate.quality import compare, examine
    from canopyq.kv_cache import cache_of
    from canopyq.tutor.loading import TUTOR, source

    saved = model != TUTOR and as_path(model).is_dir()
    if model != TUTOR and not saved:
        raise CanopyError(
            f"{shown(model)} is neither 'tutor' nor a folder, and the questions are for the tutor and checkpoints of "
            "it; any other model, such as one of the hub, is examined on a text: name one by --text FILE"
        )
    cache = None if recipe is None else recipe.cache
    if saved and recipe is not None and recipe.weights is not None:
        raise CanopyError(
            f"{model} is a folder, which is examined beside the tutor as it is; leave --recipe out, name a cache such "
            "as kv4, or examine it on a text by --text FILE"
        )
    asked = cq.tutor.questions(questions, seed=seed)
    original, tokenizer = cq.tutor.load()
    if saved:
        _require_checkpoint_of(original, tokenizer, as_path(model), source())
        quantized = cq.load(model, original.device, original.dtype)
        cache = cache_of(quantized.config) if recipe is None else cache
        result, report = compare(original, quantized, tokenizer, asked, cache=cache), None
    elif recipe is None:
        result, report = examine(original, tokenizer, asked), None
    elif recipe.weights is None:
        result, report = compare(original, original, tokenizer, asked, cache=cache), None
    else:
        quantized, _ = cq.tutor.load()
        report = quantize_loaded(TUTOR, quantized, tokenizer, recipe, method, calibration)
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
            f"{folder} is not made from {name} (another {differ[0]}); examine it on a text by --text FILE --original "
            f"<folder or hub id>, or name its original by {VARIABLE}"
        )


def _eval_json(examined: str, original, asked: list, result, report: Report | None, cache: str | None) -> dict:
    out = {"examined": examined, "dtype": str(original.dtype).removeprefix("torch."), "questions": len(asked)}
    return out | {"cache": cache} | result.to_dict() | _report_json(report)


def _report_json(report: Report | None) -> dict:
    if report is None:
        return {}
    layers = [
        vars(layer) | {"sqnr_db": layer.sqnr_db if math.isfinite(layer.sqnr_db) else None} for layer in report.layers
    ]
    size = {"before": report.bytes_before, "after": report.bytes_after}
    size["bits_per_quantized_weight"] = sum(8 * x["bytes_after"] for x in layers) / sum(
        x["shape"][0] * x["shape"][1] for x in layers
    )
    return {"recipe": report.recipe, "size": size, "layers": layers, "kept": report.kept, "notes": list(report.notes)}


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
    console.print(f"[bold green]{who}>[/] {cell(answer)}", highlight=False, soft_wrap=not console.is_terminal)
    console.print(_bars(talk))


def _bars(talk: Conversation) -> Table:
    """Weights and cache on one scale."""
    from canopyq.memory import human

    weights, cache = talk.weight_bytes, talk.cache_bytes
    kind = getattr(talk.cache, "format", None)
    tokens = f"{talk.tokens:,}" + ("" if talk.limit is None else f" of {talk.limit:,}")
    bars = Table(box=None, show_header=False, padding=(0, 1, 0, 0), style="dim")
    for name, size, note in (
        ("weights", weights, ""),
        ("cache", cache, f"{kind.name if kind else 'not quantized'}, {tokens} tokens"),
    ):
        bar = "█" * max(1, round(BAR * size / max(weights, cache)))
        bars.add_row(name, f"[{'yellow' if name == 'cache' else 'blue'}]{bar}[/]", human(size), note)
    return bars


def explain(
    model: Annotated[str, typer.Argument(help="'tutor', or a folder with a quantized checkpoint.")] = "tutor",
    recipe: Annotated[str, typer.Option(help="For 'tutor': the recipe to quantize it by.")] = "w4a16-g128",
    device: Annotated[str, typer.Option(help="Where the model would run: cpu or cuda.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Say which kernel runs each quantized layer on this machine, and why each other one does not."""
    from canopyq import checks
    from canopyq.cli.calibrated import Amount, quantize_tutor

    checks.device(device)
    if model == "tutor":
        parsed = cq.Recipe.of_weights(recipe)
        loaded, tokenizer = cq.tutor.load()
        quantize_tutor(loaded, tokenizer, parsed, amount=Amount(2))  # which kernel runs does not depend on the ranges
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
        print_plain(title, "italic")
        kernels = table("kernel", "runs for, or why not")
        for kernel, rows in first.runs.items():
            kernels.add_row(cell(kernel), cell(rows), style="bold green")
        for kernel, reason in first.refused.items():
            kernels.add_row(cell(kernel), cell(reason))
        console.print(kernels)
