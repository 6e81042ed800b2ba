"""The model that a command line names: 'tutor', a folder, or a model of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from canopyq.errors import CanopyError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from canopyq.checkpoint.files import Checkpoint

RevisionOption = Annotated[
    str | None, typer.Option(help="Of a model on the hub: a branch, a tag or a commit; default: main.")
]


def folder_of(name: str, revision: str | None = None) -> Path:
    """Where a model lies; one of the hub is fetched to the hub's cache first."""
    from canopyq.checkpoint.hub import model_folder
    from canopyq.tutor.loading import TUTOR, path, source, source_folder, verify

    if name != TUTOR:
        return model_folder(name, revision)
    if revision is not None:
        raise CanopyError(f"revision {shown(revision)} is one of a model on the hub, and 'tutor' is none")
    if source() == TUTOR:
        verify(path())
    return source_folder()


def load_named(name: str, revision: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, quantized or not, and its tokenizer, in float32 on the CPU."""
    import canopyq as cq
    from canopyq.checkpoint.files import Checkpoint
    from canopyq.checkpoint.plan import meta_model
    from canopyq.tutor.loading import TUTOR, load_other, load_tokenizer

    if name == TUTOR and revision is None:
        return cq.tutor.load()
    if is_gguf(name) and revision is None:
        return cq.load_gguf(name)
    folder = folder_of(name, revision)
    checkpoint = Checkpoint(folder)
    if is_quantized(checkpoint) and not is_source(checkpoint):
        tokenizer = load_tokenizer(folder)  # before the weights: what is missing is said at once
        return cq.load(folder), tokenizer
    meta_model(checkpoint)  # it is a model, no larger than its files, and runs no foreign code
    return load_other(folder)


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def is_source(checkpoint: Checkpoint) -> bool:
    """Whether a quantized checkpoint is in a format that models are published in, and that only `dequantized` reads."""
    from canopyq.checkpoint.derived import READABLE

    config = checkpoint.quantization
    return isinstance(config, dict) and config.get("quant_method") in READABLE


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint says that it is."""
    return bool(checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config"))
