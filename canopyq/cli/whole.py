"""`canopyq quantize` with a method, or with calibrated activations: the whole model in memory, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canopyq.errors import CanopyError
from canopyq.methods.method import Method
from canopyq.scheme import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEQUENCE = 512  # tokens of a calibration sequence, or the model's context if that is shorter
SEQUENCES = 128  # that are taken from a text, at most


def quantize_whole(
    folder: Path, recipe: Recipe, method: Method, text: Path | None, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Load the model, quantize it, save it; what ``--json`` prints.

    Raises:
        CanopyError: for what the format, the recipe or the method cannot do, before the model is loaded; a text that is
            missing, not UTF-8 or shorter than one sequence; a model that cannot be loaded.
    """
    from canopyq.checkpoint.files import refuse_not_empty
    from canopyq.checkpoint.layout import disk_format
    from canopyq.checkpoint.save import save
    from canopyq.model import quantize_
    from canopyq.tutor.loading import load_other

    method.check(recipe)
    disk_format(recipe.weights, recipe.activations)
    refuse_not_empty(out)
    needs_data = method.needs_data or recipe.static
    if text is not None and not needs_data:
        raise CanopyError(f"{method.name} with {recipe.name} needs no data; leave --calibration {text} out")
    written = None if text is None else _read(text)
    stored = _stored_dtype(folder)
    model, tokenizer = load_other(folder, "float32")
    batches = _batches(model, tokenizer, written, text, folder, say) if needs_data else None
    report = quantize_(model, recipe, method=method.name, calibration=batches)
    say(str(report))
    saved = save(model, out, tokenizer, dtype=stored)
    say(str(saved))
    return {
        "source": str(folder), "out": str(out), "recipe": recipe.name, "method": method.name,
        "bytes": {"before": report.bytes_before, "after": report.bytes_after},
        "layers": [{"name": layer.name, "output_error": layer.output_error, "notes": layer.notes}
                   for layer in report.layers],
        "notes": report.notes, "kept": report.kept,
    }  # fmt: skip


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CanopyError(f"calibration text {text} cannot be read ({error}); name a UTF-8 text file") from None


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of the original file: what is not quantized keeps it, though the work is done in float32."""
    import torch

    from canopyq.checkpoint.files import CONFIG
    from canopyq.checkpoint.layout import SCALE_DTYPES

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CanopyError(f"{folder / CONFIG} cannot be read ({error}); name a model's folder") from None
    if "quantization_config" in config:
        raise CanopyError(f"{folder} is quantized already; start from the original checkpoint")
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return dtype if dtype in SCALE_DTYPES else None


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    written: str | None,
    text: Path | None,
    folder: Path,
    say: Callable[[str], None],
) -> list[Tensor]:
    """Calibration data: sequences of the text, or of the tutor's own chats."""
    import torch

    from canopyq import tutor

    length = min(SEQUENCE, getattr(model.config, "max_position_embeddings", None) or SEQUENCE)
    if written is None:
        if folder != tutor.path():
            raise CanopyError(
                f"{folder} is not the tutor, whose own chats serve for calibration; give --calibration FILE"
            )
        chats = tutor.calibration(tokenizer)
        say(f"calibrating on {sum(map(len, chats))} chats from the tutor's validation split, none of them ever scored")
        return chats
    ids = torch.tensor(tokenizer.encode(written), dtype=torch.int64)
    count = min(len(ids) // length, SEQUENCES)
    if not count:
        raise CanopyError(
            f"calibration text {text} has {len(ids)} tokens, fewer than one sequence of {length}; give a longer one"
        )
    say(f"calibrating on {count} sequences of {length} tokens from {text}")
    return list(ids[: count * length].reshape(count, length).split(8))
