"""What needs the whole model in memory: recipes whose activations are calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import canopyq as cq
from canopyq.calibration import calibrate
from canopyq.checkpoint.files import refuse_not_empty
from canopyq.errors import CanopyError
from canopyq.scheme import Recipe
from canopyq.tutor.loading import TUTOR, load_other

if TYPE_CHECKING:
    from canopyq.report import Report


CHATS = 64  # of the tutor's own; after half as many its ranges hardly change


def quantize_tutor(model: Any, tokenizer: Any, recipe: Recipe, chats: int | None = None) -> Report:
    """`quantize_` for the tutor. Static activations are calibrated on its own chats, which come from the validation
    split: no scored question is among them."""
    if not recipe.static:
        return cq.quantize_(model, recipe)
    seen = calibrate(model, cq.tutor.calibration(tokenizer, chats or CHATS))
    seen.source = "chats of the validation split, none of them scored"
    return cq.quantize_(model, recipe, calibration=seen)


def quantize_in_memory(model: str, folder: Path, recipe: Recipe, out: Path, texts: Path | None) -> Report:
    """Load a model, calibrate it, quantize it and save it.

    Args:
        model: as it was named on the command line; "tutor" brings data of its own.
        folder: where it lies.
        texts: a file with a text in each line to calibrate on.
    """
    if model != TUTOR and texts is None:
        raise CanopyError(
            f"{recipe.name} needs its activations calibrated: name a file with a text in each line by --calibration, "
            f"or use {recipe.name.replace('-static', '')}, which needs none"
        )
    refuse_not_empty(out)
    if texts is None:
        loaded, tokenizer = cq.tutor.load()
        report = quantize_tutor(loaded, tokenizer, recipe)
    else:
        data = read_texts(texts)
        loaded, tokenizer = cq.tutor.load() if model == TUTOR else load_other(folder)
        report = cq.quantize_(loaded, recipe, calibration=calibrate(loaded, data, tokenizer=tokenizer))
    cq.save(loaded, out, tokenizer)
    return report


def read_texts(file: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        CanopyError: for a file that is not UTF-8 text, or has no line.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CanopyError(f"{file} cannot be read as text ({str(error)[:100]})") from None
    if not (texts := [line for line in lines if line]):
        raise CanopyError(f"{file} holds no text to calibrate on; it needs one in each line")
    return texts
