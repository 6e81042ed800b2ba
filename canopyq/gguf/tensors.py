"""A model's tensors as GGUF names and holds them, one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError, prefixed, unknown
from canopyq.gguf.architectures import Architecture
from canopyq.gguf.blocks import Blocks, to_blocks
from canopyq.nn.linear import QuantizedLinear

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel

UNBLOCKED = ("bf16", "f16")
REQUANTIZED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", *UNBLOCKED)  # what the gguf package can round a weight to


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file, before its bytes are made.

    Attributes:
        name: llama.cpp's.
        source: a quantized layer, whose weight it is, or a parameter; None for one that only the base has.
        rows: the order in which rows are written, or None for their own.
        offset: added to the values; see `Architecture.norm_offset`.
        base: the tensor of another GGUF that is written in its place, or None.
    """

    name: str
    source: QuantizedLinear | Tensor | None
    rows: np.ndarray | None = None
    offset: float = 0.0
    base: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.source, QuantizedLinear):
            return self.source.out_features, self.source.in_features
        return tuple(self.source.shape)

    def values(self) -> np.ndarray:
        """Float32 values, as the file has them."""
        source = self.source
        dense = source.quantized_weight.dequantize(torch.float32) if isinstance(source, QuantizedLinear) else source
        values = dense.detach().float().cpu().numpy() + np.float32(self.offset)
        return values if self.rows is None else values[self.rows]


@dataclass
class Tally:
    """What was written: matrices by type, those that were rounded anew, minima of Q4_1 and how many were rounded."""

    types: Counter[str] = field(default_factory=Counter)
    requantized: list[str] = field(default_factory=list)
    rounded: int = 0
    minima: int = 0


def library() -> Any:
    """The gguf package. Raises `CanopyError` without it."""
    return checks.extra("gguf", "gguf")


def tensors_of(model: PreTrainedModel, architecture: Architecture) -> Iterator[FileTensor]:
    """Every tensor of a model, under llama.cpp's names. A tied one comes once.

    Raises:
        CanopyError: for an architecture or tensor that llama.cpp does not have.
    """
    gguf, config = library(), model.config.get_text_config()
    kind = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}.get(architecture.name)
    if kind is None:
        raise unknown("GGUF architecture", architecture.name, gguf.MODEL_ARCH_NAMES.values())
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = config.num_attention_heads
    rotated = {"attn_q": heads, "attn_k": getattr(config, "num_key_value_heads", None) or heads}
    tied, seen = getattr(model, "all_tied_weights_keys", None) or {}, set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if isinstance(module, QuantizedLinear):
            own = {"weight": module} | ({} if module.bias is None else {"bias": module.bias})
        for leaf, source in own.items():
            full = f"{path}.{leaf}"
            if full in tied or id(source) in seen:
                continue
            seen.add(id(source))
            name = names.get_name(full, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise CanopyError(f"llama.cpp has no tensor for {full} of {type(model).__name__}")
            n = module.out_features if isinstance(source, QuantizedLinear) else source.shape[0]
            count = rotated.get(name.split(".")[-2]) if architecture.interleaved else None
            rows = None if count is None else np.arange(n).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)
            norm = isinstance(source, Tensor) and source.dim() == 1 and leaf == "weight"
            yield FileTensor(name, source, rows, architecture.norm_offset if norm else 0.0)


def write(tensor: FileTensor, writer: gguf.GGUFWriter, requantize: str | None, tally: Tally) -> None:
    """Hand a tensor to the writer, and count it.

    Raises:
        CanopyError: for codes that no type holds, unless ``requantize`` names one to round them to.
    """
    gguf = library()
    kinds = gguf.GGMLQuantizationType
    if tensor.base is not None:
        writer.add_tensor(tensor.name, tensor.base.data, raw_dtype=tensor.base.tensor_type)
        if len(tensor.base.shape) > 1:
            tally.types[tensor.base.tensor_type.name] += 1
        return
    if isinstance(tensor.source, QuantizedLinear):
        blocks = _blocks(tensor, requantize, tally)
        writer.add_tensor(tensor.name, blocks.data, raw_dtype=kinds[blocks.type])
        if blocks.tensor_scale is not None:
            scale = np.array([blocks.tensor_scale], np.float32)
            writer.add_tensor(tensor.name.removesuffix("weight") + "scale", scale)
        tally.types[blocks.type] += 1
        tally.rounded += blocks.rounded
        tally.minima += blocks.count
        return
    values = tensor.values()
    if values.ndim == 1:  # llama.cpp wants vectors in float32
        writer.add_tensor(tensor.name, values)
        return
    name = _narrowest(torch.from_numpy(values))
    tally.types[name] += 1
    writer.add_tensor(tensor.name, gguf.quants.quantize(values, kinds[name]), raw_dtype=kinds[name])


def _blocks(tensor: FileTensor, requantize: str | None, tally: Tally) -> Blocks:
    """The codes as they are, or if no type holds them, the weight rounded anew as asked."""
    gguf = library()
    try:
        with prefixed(f"{tensor.name}: "):
            return to_blocks(tensor.source.quantized_weight, tensor.rows)
    except CanopyError:
        if requantize is None:
            raise
    if tensor.shape[1] % 32 and requantize.lower() not in UNBLOCKED:
        raise CanopyError(
            f"{tensor.name}: {tensor.shape[1]} in_features do not fill {requantize}'s blocks of 32; use "
            "requantize='bf16', or keep this layer by the ignore list"
        )
    kind = gguf.GGMLQuantizationType[requantize.upper()]
    tally.requantized.append(tensor.name)
    return Blocks(gguf.quants.quantize(tensor.values(), kind), kind.name)


def _narrowest(values: Tensor) -> str:
    """The narrowest type that holds float32 values exactly."""
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        if torch.equal(values.to(dtype).float(), values):
            return name
    return "F32"
