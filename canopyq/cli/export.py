"""`canopyq export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from canopyq.cli.output import JsonFlag, print_json, print_plain
from canopyq.errors import shown, wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export(
    model: Annotated[str, typer.Argument(help="A folder that canopyq or transformers wrote, or 'tutor'.")],
    gguf: Annotated[Path, typer.Option("--gguf", help="The GGUF file to write; it must not exist.")],
    base: Annotated[
        Path | None, typer.Option(help="A GGUF of the model it was made from: only its tensors are replaced.")
    ] = None,
    requantize: Annotated[
        str | None, typer.Option(help="Round weights whose codes no GGUF type holds anew, to q8_0, q5_1, q4_0 …")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a model as one GGUF file for llama.cpp and Ollama, its codes exactly as they are."""
    from canopyq.gguf.export import export_gguf, new_file

    new_file(gguf)  # before the model is loaded
    loaded, tokenizer = _load(model, with_tokenizer=base is None)
    done = export_gguf(loaded, gguf, tokenizer, base=base, requantize=requantize)
    if as_json:
        print_json(
            {"path": str(done.path), "bytes": done.bytes, "types": done.types, "requantized": list(done.requantized),
             "notes": list(done.notes)}
        )  # fmt: skip
    else:
        print_plain(done)


def _load(model: str, *, with_tokenizer: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    import canopyq as cq
    from canopyq.checkpoint.files import Checkpoint
    from canopyq.tutor.loading import TUTOR

    if model == TUTOR:
        return cq.tutor.load()
    source = Checkpoint(model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with wrapped(f"{shown(model)} cannot be loaded", "check its files"):
        if source.config.get("quantization_config"):
            loaded = cq.load(source.folder)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        if not with_tokenizer:
            return loaded, None
        return loaded, AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
