"""What needs the whole model in memory: methods, and recipes whose activations are calibrated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import canopyq as cq
from canopyq import checks
from canopyq.calibration.calibrate import calibrate
from canopyq.calibration.data import ROWS
from canopyq.checkpoint.files import Checkpoint
from canopyq.checkpoint.layout import SCALE_DTYPES
from canopyq.checkpoint.output import refuse_not_empty
from canopyq.errors import CanopyError
from canopyq.evaluate.texts import LENGTH, read_texts, windows
from canopyq.methods.registry import Method
from canopyq.tensor.scheme import Recipe
from canopyq.tutor.loading import TUTOR

if TYPE_CHECKING:
    from canopyq.model.report import Report


CHATS = 64  # of the tutor's own; after half as many its ranges hardly change
CALIBRATION_TOKENS = 2**15  # of a text of the caller's
SOURCE = "chats of the validation split, none of them scored"


@dataclass(frozen=True)
class Amount:
    """Of the data to calibrate on: so many samples, each of so many tokens; None takes what is usual."""

    samples: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        for option, value, least in (("--samples", self.samples, 1), ("--length", self.length, 2)):
            if value is not None:
                checks.count(option, value, least)


def quantize_tutor(
    model: Any, tokenizer: Any, recipe: Recipe, method: str = "rtn", amount: Amount = Amount()
) -> Report:
    """`quantize_` for the tutor. What needs data gets its own chats, which come from the validation split: no scored
    question is among them."""
    if Method.parse(method).needs_data:
        data = cq.tutor.calibration(tokenizer, amount.samples or CHATS, amount.length or LENGTH)
        report = cq.quantize_(model, recipe, method=method, calibration=data)
        return replace(report, notes=(*report.notes, f"calibrated on {sum(map(len, data))} {SOURCE}"))
    if not recipe.static:
        return cq.quantize_(model, recipe, method=method)
    seen = calibrate(model, cq.tutor.calibration(tokenizer, amount.samples or CHATS, amount.length or LENGTH))
    seen.source = SOURCE
    return cq.quantize_(model, recipe, calibration=seen)


def quantize_loaded(
    name: str,
    loaded: Any,
    tokenizer: Any,
    recipe: Recipe,
    method: Method,
    text: Path | None = None,
    amount: Amount = Amount(),
) -> Report:
    """`quantize_` for the model that a command names, calibrated where recipe or method ask for it.

    Args:
        name: as it was given; "tutor" brings data of its own.
        text: a file or folder of text to calibrate on.
    """
    check_calibration(name, recipe, method, text, amount)
    if text is None:
        if name == TUTOR:
            return quantize_tutor(loaded, tokenizer, recipe, method.name, amount)
        return cq.quantize_(loaded, recipe, method=method.name)
    length = amount.length or min(LENGTH, checks.context(loaded) or LENGTH)
    most = CALIBRATION_TOKENS if amount.samples is None else amount.samples * length
    rows = windows(read_texts(text), tokenizer, loaded, tokens=max(most, length), length=length)
    data = [torch.cat(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
    if recipe.static and not method.needs_data:
        seen = calibrate(loaded, data)
        seen.source = str(text)
        return cq.quantize_(loaded, recipe, method=method.name, calibration=seen)
    report = cq.quantize_(loaded, recipe, method=method.name, calibration=data)
    told = f"calibrated on {len(rows)} windows of {rows[0].shape[1]} tokens of {text}"
    return replace(report, notes=(*report.notes, told))


def check_calibration(name: str, recipe: Recipe, method: Method, text: Path | None, amount: Amount = Amount()) -> None:
    """Refuse text that is of no use, and a model without the text that it needs; said before the model is loaded."""
    if (text is not None or amount != Amount()) and not (method.needs_data or recipe.static):
        raise CanopyError(
            f"{method.name} needs no data for {recipe.name}; leave --calibration, --samples and --length out"
        )
    if text is not None:
        read_texts(text)
    elif name != TUTOR and method.needs_data:
        raise CanopyError(
            f"method {method.name} looks at the inputs of every layer: name a file or folder of text by --calibration, "
            "or use hqq, which needs none"
        )
    elif name != TUTOR and recipe.static:
        raise CanopyError(
            f"{recipe.name} needs its activations calibrated: name a file or folder of text by --calibration, or use "
            f"{recipe.name.replace('-static', '')}, which needs none"
        )


def quantize_in_memory(
    model: str,
    read: Callable[[], tuple[Any, Any]],
    dtype: torch.dtype | None,
    recipe: Recipe,
    method: Method,
    out: Path,
    text: Path | None,
    amount: Amount = Amount(),
) -> Report:
    """Load a model, calibrate it, quantize it and save it.

    Args:
        model: as it was named on the command line; "tutor" brings data of its own.
        read: gives the model and its tokenizer.
        dtype: in which what is not quantized is saved; None as it is in memory.
        text: a file or folder of text to calibrate on.
    """
    check_calibration(model, recipe, method, text, amount)
    refuse_not_empty(out)
    loaded, tokenizer = read()
    report = quantize_loaded(model, loaded, tokenizer, recipe, method, text, amount)
    cq.save(loaded, out, tokenizer, dtype=dtype)
    return report


def dtype_on_disk(source: Checkpoint) -> torch.dtype | None:
    """The dtype that config.json names; None if it names none that a checkpoint can have."""
    dtype = getattr(torch, str(source.config.get("dtype") or source.config.get("torch_dtype")), None)
    return dtype if dtype in SCALE_DTYPES else None
