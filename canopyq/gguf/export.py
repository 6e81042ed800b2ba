"""`export_gguf`: a model into one GGUF file for llama.cpp and Ollama, its codes exactly as they are."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from canopyq import checks
from canopyq.checkpoint.files import as_path
from canopyq.errors import CanopyError, one_line, prefixed, shown, unknown
from canopyq.experts import QuantizedExperts, is_experts
from canopyq.gguf.architectures import ARCHITECTURES, Architecture, context_of, describe
from canopyq.gguf.blocks import Blocks, to_blocks
from canopyq.gguf.tokenizer import add_tokenizer
from canopyq.linear import QuantizedLinear
from canopyq.memory import human
from canopyq.utils import Preformatted, track

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUNDED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "bf16", "f16")  # what gguf can round a weight to


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


@dataclass
class _Matrix:
    """A tensor of the file before its bytes are made: those of one are held at a time."""

    name: str
    source: QuantizedLinear | Tensor
    rows: np.ndarray | None = None
    offset: float = 0.0
    base: Any = None


@dataclass
class _Tally:
    types: Counter[str] = field(default_factory=Counter)
    requantized: list[str] = field(default_factory=list)
    rounded: int = 0
    minima: int = 0


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
    gguf = _library()
    path = as_path(path)
    if path.exists():
        raise CanopyError(f"{path} exists; name a file that does not, or remove it first")
    if not path.parent.is_dir():
        raise CanopyError(f"{path.parent} is no folder; make it first")
    if requantize is not None:
        checks.choice("GGUF type", requantize.lower() if isinstance(requantize, str) else requantize, ROUNDED)
    if tokenizer is not None:
        checks.tokenizer(tokenizer)
    config = checks.language_model("model", model).config
    if any(isinstance(module, QuantizedExperts) or is_experts(module) for module in model.modules()):
        raise CanopyError(f"{type(model).__name__} has experts, which are not written to GGUF yet; use cq.save")
    kind = getattr(config, "model_type", "")
    if base is None and kind not in ARCHITECTURES:
        raise unknown("family for GGUF", kind, ARCHITECTURES, more="; for others give base= with a GGUF of the model")
    if base is None and tokenizer is None:
        raise CanopyError("a GGUF file holds the tokenizer; give tokenizer=, or base= with a GGUF of the model")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    tally = _Tally()
    try:
        if base is None:
            architecture = ARCHITECTURES[kind]
            writer = gguf.GGUFWriter(part, architecture.name)
            writer.add_name(path.stem)
            extra = describe(writer, config, architecture)
            add_tokenizer(writer, tokenizer, config.vocab_size)
            matrices = list(_matrices(model, architecture, gguf))
            for name, values in extra.items():
                writer.add_tensor(name, values)
        else:
            reader = read(base)
            name = reader.fields["general.architecture"].contents()
            architecture = ARCHITECTURES.get(kind, Architecture(name, interleaved=name == "llama"))
            if architecture.name != name:
                raise CanopyError(f"the base is a {shown(name)}, and {type(model).__name__} a {architecture.name!r}")
            writer = gguf.GGUFWriter(part, name)
            _copy_fields(reader, writer, gguf)
            matrices = _over(reader, list(_matrices(model, architecture, gguf, name)), kind in ARCHITECTURES)
        for matrix in track(matrices, "writing GGUF"):
            _write(matrix, writer, requantize, tally, gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.link(part, path)  # fails if the name was taken meanwhile
    except FileExistsError:
        raise CanopyError(f"{path} exists; name a file that does not, or remove it first") from None
    finally:
        part.unlink(missing_ok=True)
    return Exported(
        path,
        path.stat().st_size,
        dict(tally.types),
        tuple(tally.requantized),
        tuple(_notes(model, tally, base is None)),
    )


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise CanopyError('GGUF files need the gguf package; pip install "canopyq[gguf]"') from None
    return gguf


def read(path: str | Path) -> gguf.GGUFReader:
    """A GGUF file's metadata and tensors, mapped from the disk. Never reads beyond the file's end.

    Raises:
        CanopyError: if it is no whole GGUF file.
    """
    gguf = _library()

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **options: Any) -> np.ndarray:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, *order, **options)

    path = as_path(path)
    if not path.is_file():
        raise CanopyError(f"{path} is no file; name a GGUF file")
    try:
        reader = Reader(path)
        if not isinstance(reader.fields["general.architecture"].contents(), str):
            raise ValueError("it names no architecture")
        return reader
    except Exception as error:  # whatever the library raises on damaged files
        raise CanopyError(f"{path} is no whole GGUF file ({one_line(error)}); copy or download it again") from None


def _matrices(
    model: PreTrainedModel, architecture: Architecture, gguf: Any, name: str | None = None
) -> Iterator[_Matrix]:
    """Every tensor of the file, under llama.cpp's names."""
    config = model.config
    layers = config.get_text_config().num_hidden_layers
    kind = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}.get(name or architecture.name)
    if kind is None:
        raise unknown("GGUF architecture", name or architecture.name, gguf.MODEL_ARCH_NAMES.values())
    names = gguf.get_tensor_name_map(kind, layers)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if isinstance(module, QuantizedLinear):
            own = {"weight": module} | ({} if module.bias is None else {"bias": module.bias})
        for leaf, source in own.items():
            full = f"{path}.{leaf}"
            if full in tied or id(source) in seen:
                continue
            seen.add(id(source))
            found = names.get_name(full, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise CanopyError(
                    f"llama.cpp has no tensor for {full} of {type(model).__name__}; it cannot be exported"
                )
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            count = heads.get(found.split(".")[-2]) if architecture.interleaved else None
            n = module.out_features if isinstance(source, QuantizedLinear) else source.shape[0]
            rows = None if count is None else np.arange(n).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)
            is_norm = isinstance(source, Tensor) and source.dim() == 1 and leaf == "weight"
            yield _Matrix(found, source, rows, architecture.norm_offset if is_norm else 0.0)


def _over(reader: gguf.GGUFReader, matrices: list[_Matrix], known: bool) -> list[_Matrix]:
    """The base's tensors, those that the model has in their place; what did not change stays as the base has it."""
    ours = {matrix.name: matrix for matrix in matrices}
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    if missing := sorted(ours.keys() - theirs.keys() - {"output.weight"}):
        raise CanopyError(f"the base has no {missing[0]}; give a GGUF of the model that this one was made from")
    found = []
    for name, tensor in theirs.items():
        matrix = ours.pop(name, None)
        if matrix is None:
            matrix = _Matrix(name, torch.empty(0), base=tensor)
        else:
            shape = tuple(reversed(tensor.shape.tolist()))
            own = _shape(matrix.source)
            if shape != own:
                raise CanopyError(
                    f"{name} is {shape} in the base and {own} in the model; give a GGUF of the same model"
                )
            if isinstance(matrix.source, Tensor):
                if _same(matrix, tensor, exact=known):
                    matrix = _Matrix(name, matrix.source, base=tensor)
                elif not known:
                    raise CanopyError(
                        f"the method changed {name}, and how this family writes it is not known; use rtn, gptq or hqq"
                    )
        found.append(matrix)
    return found + list(ours.values())


def _same(matrix: _Matrix, tensor: Any, *, exact: bool) -> bool:
    """Whether a base's tensor holds what the model does: exactly, or as it is or plus 1, up to the rounding of its
    type, where it is not known how the family writes it."""
    import gguf

    own = _dense(matrix)
    theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(own.shape)
    if exact:
        return np.array_equal(own, theirs)
    limit = 0.2 * np.abs(theirs).max() if tensor.tensor_type.name not in ("F32", "F16", "BF16") else 0.0
    return any(bool(np.all(np.abs(own + shift - theirs) <= limit + np.abs(theirs) / 128)) for shift in (0.0, 1.0))


def _shape(source: QuantizedLinear | Tensor) -> tuple[int, ...]:
    return tuple(source.shape) if isinstance(source, Tensor) else (source.out_features, source.in_features)


def _dense(matrix: _Matrix) -> np.ndarray:
    """Float32 values as the file has them."""
    values = matrix.source.detach().float().cpu().numpy() + np.float32(matrix.offset)
    return values if matrix.rows is None else values[matrix.rows]


def _write(matrix: _Matrix, writer: gguf.GGUFWriter, requantize: str | None, tally: _Tally, gguf: Any) -> None:
    kinds = gguf.GGMLQuantizationType
    if matrix.base is not None:
        writer.add_tensor(matrix.name, matrix.base.data, raw_dtype=matrix.base.tensor_type)
        if len(matrix.base.shape) > 1:
            tally.types[matrix.base.tensor_type.name] += 1
        return
    if isinstance(matrix.source, QuantizedLinear):
        weight = matrix.source.quantized_weight
        try:
            with prefixed(f"{matrix.name}: "):
                blocks = to_blocks(weight, matrix.rows)
        except CanopyError:
            if requantize is None:
                raise
            values = weight.dequantize(torch.float32).cpu().numpy()
            kind = kinds[requantize.upper()]
            blocks = Blocks(
                gguf.quants.quantize(values if matrix.rows is None else values[matrix.rows], kind), kind.name
            )
            tally.requantized.append(matrix.name)
        writer.add_tensor(matrix.name, blocks.data, raw_dtype=kinds[blocks.type])
        if blocks.tensor_scale is not None:
            writer.add_tensor(matrix.name.removesuffix("weight") + "scale", np.array([blocks.tensor_scale], np.float32))
        tally.types[blocks.type] += 1
        tally.rounded += blocks.rounded
        tally.minima += blocks.count
        return
    values = _dense(matrix)
    if values.ndim == 1:
        writer.add_tensor(matrix.name, values)
        return
    name = _narrowest(torch.from_numpy(values))
    tally.types[name] += 1
    writer.add_tensor(matrix.name, gguf.quants.quantize(values, kinds[name]), raw_dtype=kinds[name])


def _narrowest(values: Tensor) -> str:
    """The narrowest type that holds float32 values exactly."""
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        if torch.equal(values.to(dtype).float(), values):
            return name
    return "F32"


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, gguf: Any) -> None:
    """The base's metadata, but for what the writer says itself and what described its own types."""
    left = {"general.architecture", "general.file_type", "general.quantization_version"}
    for name, found in reader.fields.items():
        if name in left or name.startswith("GGUF."):
            continue
        inner = found.types[-1] if found.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, found.contents(), found.types[0], inner)


def _notes(model: PreTrainedModel, tally: _Tally, described: bool) -> Iterator[str]:
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
