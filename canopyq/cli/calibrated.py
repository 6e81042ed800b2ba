"""What needs the whole model in memory: methods, and recipes whose activations are calibrated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import canopyq as cq
from canopyq.calibration.calibrate import calibrate
from canopyq.checkpoint.files import Checkpoint, as_path
from canopyq.checkpoint.layout import SCALE_DTYPES
from canopyq.checkpoint.output import refuse_not_empty
from canopyq.errors import CanopyError, one_line
from canopyq.methods.registry import Method
from canopyq.tensor.scheme import Recipe
from canopyq.tutor.loading import TUTOR, load_other

if TYPE_CHECKING:
    from canopyq.model.report import Report


CHATS = 64  # of the tutor's own; after half as many its ranges hardly change


SOURCE = "chats of the validation split, none of them scored"


def quantize_tutor(model: Any, tokenizer: Any, recipe: Recipe, chats: int | None = None, method: str = "rtn") -> Report:
    """`quantize_` for the tutor. What needs data gets its own chats, which come from the validation split: no scored
    question is among them."""
    if Method.parse(method).needs_data:
        data = cq.tutor.calibration(tokenizer, chats or CHATS)
        report = cq.quantize_(model, recipe, method=method, calibration=data)
        return replace(report, notes=(*report.notes, f"calibrated on {sum(map(len, data))} {SOURCE}"))
    if not recipe.static:
        return cq.quantize_(model, recipe, method=method)
    seen = calibrate(model, cq.tutor.calibration(tokenizer, chats or CHATS))
    seen.source = SOURCE
    return cq.quantize_(model, recipe, calibration=seen)


def quantize_in_memory(
    model: str, source: Checkpoint, recipe: Recipe, method: Method, out: Path, texts: Path | None
) -> Report:
    """Load a model, calibrate it, quantize it and save it. What is not quantized keeps the dtype that it has on disk.

    Args:
        model: as it was named on the command line; "tutor" brings data of its own.
        source: where it lies.
        texts: a file with a text in each line to calibrate on.
    """
    if texts is not None and not (method.needs_data or recipe.static):
        raise CanopyError(f"{method.name} needs no data for {recipe.name}; leave --calibration out")
    if model != TUTOR and texts is None and method.needs_data:
        raise CanopyError(
            f"method {method.name} looks at the inputs of every layer: name a file with a text in each line by "
            "--calibration, or use hqq, which needs none"
        )
    if model != TUTOR and texts is None and recipe.static:
        raise CanopyError(
            f"{recipe.name} needs its activations calibrated: name a file with a text in each line by --calibration, "
            f"or use {recipe.name.replace('-static', '')}, which needs none"
        )
    refuse_not_empty(out)
    data = None if texts is None else read_texts(texts)
    loaded, tokenizer = cq.tutor.load() if model == TUTOR else load_other(source.folder)
    if model == TUTOR and data is None:
        report = quantize_tutor(loaded, tokenizer, recipe, method=method.name)
    elif recipe.static and not method.needs_data:
        report = cq.quantize_(
            loaded, recipe, method=method.name, calibration=calibrate(loaded, data, tokenizer=tokenizer)
        )
    else:
        report = cq.quantize_(loaded, recipe, method=method.name, calibration=data, tokenizer=tokenizer)
    cq.save(loaded, out, tokenizer, dtype=_dtype_on_disk(source))
    return report


def _dtype_on_disk(source: Checkpoint) -> torch.dtype | None:
    """The dtype that config.json names; None if it names none that a checkpoint can have."""
    dtype = getattr(torch, str(source.config.get("dtype") or source.config.get("torch_dtype")), None)
    return dtype if dtype in SCALE_DTYPES else None


def read_texts(file: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        CanopyError: for a file that is not UTF-8 text, or has no line.
    """
    file = as_path(file)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CanopyError(f"{file} cannot be read as text ({one_line(error)})") from None
    if not (texts := [line for line in lines if line]):
        raise CanopyError(f"{file} holds no text to calibrate on; it needs one in each line")
    return texts
