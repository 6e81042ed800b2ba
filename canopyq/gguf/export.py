"""`export_gguf`: a model into one GGUF file for llama.cpp and Ollama, its codes exactly as they are."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from canopyq import checks
from canopyq.checkpoint.files import as_path
from canopyq.errors import CanopyError, shown, unknown
from canopyq.gguf.architectures import ARCHITECTURES, Architecture, context_of, describe
from canopyq.gguf.base import copy_fields, over, read
from canopyq.gguf.tensors import REQUANTIZED, Tally, library, tensors_of, write
from canopyq.gguf.tokenizer import add_tokenizer
from canopyq.memory import human
from canopyq.nn.experts import QuantizedExperts
from canopyq.nn.kinds import Experts, kind_of
from canopyq.nn.linear import QuantizedLinear
from canopyq.utils import Preformatted, track

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Exported(Preformatted):
    """What was written.

    Attributes:
        types: GGML type -> number of matrices.
        requantized: weights whose codes no type holds, rounded anew as asked.
        notes: what to know of the file.
    """

    path: Path
    bytes: int
    types: dict[str, int]
    requantized: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.types.items())
        return "\n".join(
            [f"{self.path}: {human(self.bytes)}; matrices: {types}", *(f"  note: {n}" for n in self.notes)]
        )


def new_file(path: str | Path) -> Path:
    """A path at which nothing is yet, in a folder that exists.

    Raises:
        CanopyError: if that is not so.
    """
    path = as_path(path)
    if path.exists():
        raise CanopyError(f"{path} exists; name a file that does not, or remove it first")
    if not path.parent.is_dir():
        raise CanopyError(f"{path.parent} is no folder; make it first")
    return path


def export_gguf(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    base: str | Path | None = None,
    requantize: str | None = None,
) -> Exported:
    """Write ``model`` as a GGUF file. Needs the ``gguf`` package: ``pip install "canopyq[gguf]"``.

    Quantized weights keep their codes and scales; see `canopyq.gguf.blocks` for the types that hold them. Everything
    else is written in the narrowest of bfloat16, float16 and float32 that holds its values exactly; vectors are
    float32, as llama.cpp wants them. Activations and keys and values are llama.cpp's own affair.

    Args:
        path: the file; it must not exist.
        tokenizer: of the model; not needed with ``base``.
        base: a GGUF file of the model that ``model`` was made from: its metadata and tokenizer are taken over, and
            only its tensors replaced. For families that are not described here, and for everything that their makers
            put into a file.
        requantize: the type for weights whose codes no type holds (NF4, FP8, asymmetric INT8): they are dequantized
            and rounded anew, such as ``"q8_0"``. None refuses them.

    Raises:
        CanopyError: for a family, tokenizer or code that the file cannot hold, a base of another model, a path that
            exists. Nothing is written then.
    """
    gguf = library()
    path = new_file(path)
    if requantize is not None:
        checks.choice("GGUF type", requantize.lower() if isinstance(requantize, str) else requantize, REQUANTIZED)
    if tokenizer is not None:
        checks.tokenizer(tokenizer)
    config = checks.language_model("model", model).config
    if any(isinstance(module, QuantizedExperts) or isinstance(kind_of(module), Experts) for module in model.modules()):
        raise CanopyError(f"{type(model).__name__} has experts, which are not written to GGUF yet; use cq.save")
    kind = getattr(config, "model_type", "")
    if base is None and kind not in ARCHITECTURES:
        raise unknown("family for GGUF", kind, ARCHITECTURES, more="; for others give base= with a GGUF of the model")
    if base is None and tokenizer is None:
        raise CanopyError("a GGUF file holds the tokenizer; give tokenizer=, or base= with a GGUF of the model")
    part, tally = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part"), Tally()
    try:
        if base is None:
            architecture = ARCHITECTURES[kind]
            writer = gguf.GGUFWriter(part, architecture.name)
            writer.add_name(path.stem)
            for name, values in describe(writer, config, architecture).items():
                writer.add_tensor(name, values)
            add_tokenizer(writer, tokenizer, config.vocab_size)
            tensors = list(tensors_of(model, architecture))
        else:
            reader = read(base)
            name = reader.fields["general.architecture"].contents()
            architecture = ARCHITECTURES.get(kind, Architecture(name, interleaved=True))
            if architecture.name != name:
                raise CanopyError(f"the base is a {shown(name)}, and {type(model).__name__} a {architecture.name!r}")
            writer = gguf.GGUFWriter(part, name)
            copy_fields(reader, writer)
            tensors = over(reader, list(tensors_of(model, architecture)), known=kind in ARCHITECTURES)
        for tensor in track(tensors, "writing GGUF"):
            write(tensor, writer, requantize, tally)
        _describe_types(writer, tally)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    notes = tuple(_notes(model, tally, base is None))
    return Exported(path, path.stat().st_size, dict(tally.types), tuple(tally.requantized), notes)


def _describe_types(writer: gguf.GGUFWriter, tally: Tally) -> None:
    """What most matrices are, as llama.cpp and Ollama show it."""
    gguf = library()
    name = tally.types.most_common(1)[0][0]
    names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}  # the one name that there is for MXFP4
    if (kind := getattr(gguf.LlamaFileType, names.get(name, f"MOSTLY_{name}"), None)) is not None:
        writer.add_file_type(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _notes(model: PreTrainedModel, tally: Tally, described: bool) -> Iterator[str]:
    if tally.rounded:
        yield (
            f"{tally.rounded} of {tally.minima} minima of Q4_1 blocks are rounded to float16 (by at most 1 in 2,048); "
            "codes and scales are exact"
        )
    if tally.requantized:
        yield f"{len(tally.requantized)} weights were rounded anew, such as {tally.requantized[0]}"
    if described and (context := context_of(model.config)) < model.config.max_position_embeddings:
        yield f"the context ends at {context:,} tokens: llama.cpp has no sliding window for this family"
    narrow = {m.scheme.format.bits for m in model.modules() if isinstance(m, QuantizedLinear)} & {2, 3}
    if narrow:
        yield f"codes of {' and '.join(map(str, sorted(narrow)))} bits take the 4.5 bits of Q4_0 there"
    if any(isinstance(m, QuantizedLinear) and m.activations is not None for m in model.modules()):
        yield "activations are not quantized by the recipe there: llama.cpp rounds them in its own way"
