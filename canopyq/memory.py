"""Bytes: the arithmetic that predicts them, the shapes of real models, and what a model in memory really holds."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.errors import CanopyError, shown, unknown
from canopyq.tensor.formats import (
    KV_BLOCK,
    KV_RESIDUAL_LENGTH,
    BlockFormat,
    Format,
    IntFormat,
    TableFormat,
    get_cache_format,
    get_format,
    kv_group_size,
)
from canopyq.tensor.quantized_tensor import part_bytes
from canopyq.tensor.scheme import Recipe


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like decoder: enough to count its parameters and its cache."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers inside the blocks: what weight quantization works on."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * (self.hidden * (2 * q + 2 * kv) + 3 * self.hidden * self.ffn)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The in_features that the linear layers have."""
        return tuple(sorted({self.hidden, self.heads * self.head_dim, self.ffn}))

    @property
    def parameters(self) -> int:
        """All parameters: blocks, biases, norms, embedding and head."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim * self.layers if self.qkv_bias else 0
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear_parameters + biases + norms + self.vocab * self.hidden * (1 if self.tied else 2)

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and (out_features, in_features) of every linear layer inside the blocks."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q": (q, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden), "o": (self.hidden, q)}
        wide = (self.ffn, self.hidden)
        mlp = {"gate": wide, "up": wide, "down": (self.hidden, self.ffn)}
        for i in range(self.layers):
            for part, matrices in (("self_attn", attention), ("mlp", mlp)):
                for name, shape in matrices.items():
                    yield f"model.layers.{i}.{part}.{name}_proj", shape

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The shape that a transformers config of a Llama-like model describes.

        Raises:
            CanopyError: for a config that lacks one of the sizes, or has experts.
        """
        names = {"hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
                 "ffn": "intermediate_size", "vocab": "vocab_size"}  # fmt: skip
        sizes = {field: getattr(config, name, None) for field, name in names.items()}
        if lacking := [names[field] for field, size in sizes.items() if not isinstance(size, int)]:
            raise CanopyError(f"the config has no {lacking[0]}: it is not of a Llama-like model, whose bytes are known")
        if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
            raise CanopyError("a model with experts has other layers than a Llama-like one; its bytes are not counted")
        heads = max(sizes["heads"], 1)
        sizes["kv_heads"] = getattr(config, "num_key_value_heads", None) or sizes["heads"]
        sizes["head_dim"] = getattr(config, "head_dim", None) or sizes["hidden"] // heads
        if bad := [f"{name} {shown(size)}" for name, size in sizes.items() if not 1 <= size <= 10**9]:
            raise CanopyError(f"by the config the model's {bad[0]} is none that a model has; mend it")
        kind = getattr(config, "model_type", "")
        return cls(
            **sizes,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            qkv_bias=bool(getattr(config, "attention_bias", False)) or kind == "qwen2",
        )


# From each model's published config.json.
MODEL_SHAPES: dict[str, ModelShape] = {
    "tutor": ModelShape(256, 8, 4, 2, 64, 1024, 1280, tied=True),
    "qwen2.5-0.5b": ModelShape(896, 24, 14, 2, 64, 4864, 151936, tied=True, qkv_bias=True),
    "llama-3.2-1b": ModelShape(2048, 16, 32, 8, 64, 8192, 128256, tied=True),
    "qwen2.5-1.5b": ModelShape(1536, 28, 12, 2, 128, 8960, 151936, tied=True, qkv_bias=True),
    "qwen2.5-3b": ModelShape(2048, 36, 16, 2, 128, 11008, 151936, tied=True, qkv_bias=True),
    "llama-3.2-3b": ModelShape(3072, 28, 24, 8, 128, 8192, 128256, tied=True),
    "llama-2-7b": ModelShape(4096, 32, 32, 32, 128, 11008, 32000),
    "mistral-7b": ModelShape(4096, 32, 32, 8, 128, 14336, 32000),
    "qwen2.5-7b": ModelShape(3584, 28, 28, 4, 128, 18944, 152064, qkv_bias=True),
    "llama-3.1-8b": ModelShape(4096, 32, 32, 8, 128, 14336, 128256),
    "llama-2-13b": ModelShape(5120, 40, 40, 40, 128, 13824, 32000),
    "qwen2.5-14b": ModelShape(5120, 48, 40, 8, 128, 13824, 152064, qkv_bias=True),
    "qwen2.5-32b": ModelShape(5120, 64, 40, 8, 128, 27648, 152064, qkv_bias=True),
    "llama-2-70b": ModelShape(8192, 80, 64, 8, 128, 28672, 32000),
    "llama-3.1-70b": ModelShape(8192, 80, 64, 8, 128, 28672, 128256),
    "qwen2.5-72b": ModelShape(8192, 80, 64, 8, 128, 29568, 152064, qkv_bias=True),
}


def parameter_count(text: str | int | float) -> int:
    """The number of parameters that ``text`` names: ``"7B"``, ``"350M"``, ``"7e9"``, ``7_000_000_000``, or a model of
    `MODEL_SHAPES` such as ``"llama-2-7b"``.

    Raises:
        CanopyError: for anything else, with the nearest model names.
    """
    key = (text if isinstance(text, str) else shown(text)).lower().replace("_", "")
    if key in MODEL_SHAPES:
        return MODEL_SHAPES[key].parameters
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kmbt]?)", key)
    if not match:
        raise unknown("model size", text, MODEL_SHAPES, more=", or a count such as 7B or 350M")
    count = float(match.group(1)) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match.group(2)]
    if not 1 <= count <= 1e15:
        raise CanopyError(f"a model of {shown(text)} parameters is not one to size; use a count such as 7B or 350M")
    return round(count)


@dataclass(frozen=True)
class WeightBytes:
    """Where the bytes of quantized weights go."""

    codes: float
    scales: float = 0.0
    zero_points: float = 0.0

    @property
    def total(self) -> float:
        return self.codes + self.scales + self.zero_points


def weight_bytes(
    parameters: int | float,
    format: str | Format,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    scale_bits: int = 16,
) -> WeightBytes:
    """Bytes of ``parameters`` weights in a format, in theory: codes, scales and zero points.

    Without ``group_size`` the scales of a tensor or channel are left out: they are under a thousandth of the weights.
    Zero points are counted at the width of a code, as checkpoints pack them. A format that fixes its blocks (MXFP4,
    NVFP4) has 8 bits of scale for each, NF4 a scale per 64 values unless ``group_size`` says otherwise.

    Raises:
        CanopyError: for an unknown format, or a group size that the format does not take.
    """
    fmt = get_format(format)
    checks.number("parameters", parameters, 1, 1e15), checks.flag("symmetric", symmetric)
    checks.count("scale_bits", scale_bits, 1, 64)
    if group_size is not None:
        checks.count("group_size", group_size, 1)
    if not symmetric and not isinstance(fmt, IntFormat):
        raise CanopyError(f"{fmt.name} has no zero point; leave asymmetric out")
    codes = parameters * fmt.bits / 8
    if isinstance(fmt, BlockFormat):
        if group_size not in (None, fmt.block_size):
            raise CanopyError(f"{fmt.name} fixes its blocks at {fmt.block_size} values; leave the group size out")
        return WeightBytes(codes, parameters / fmt.block_size)
    if isinstance(fmt, TableFormat):
        group_size = group_size or 64
    if group_size is None:
        return WeightBytes(codes)
    if fmt.bits >= 16:
        raise CanopyError(f"{fmt.name} is a plain cast without scales; leave the group size out")
    groups = parameters / group_size
    return WeightBytes(codes, groups * scale_bits / 8, 0.0 if symmetric else groups * fmt.bits / 8)


@dataclass(frozen=True)
class ModelBytes:
    """Where the bytes of a quantized model go; ``plain`` is what stays in 16 bits: embedding, head, norms, biases."""

    codes: int
    scales: int
    zero_points: int
    plain: int

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.zero_points + self.plain


def model_bytes(shape: ModelShape, recipe: Recipe | None = None) -> ModelBytes:
    """What a bfloat16 model of this shape holds once it is quantized by a recipe; None leaves it as it is, and so
    does a recipe of the cache alone.

    It is what `bytes_held` reads from such a model, the few bytes of rotary frequencies aside.

    Raises:
        CanopyError: if the recipe's groups do not fit a layer.
    """
    checks.instance("shape", shape, ModelShape, "use MODEL_SHAPES or ModelShape.of(config)")
    if recipe is not None:
        checks.instance("recipe", recipe, Recipe, "use Recipe.parse(name)")
    return _model_bytes(shape, recipe)


@cache
def _model_bytes(shape: ModelShape, recipe: Recipe | None) -> ModelBytes:
    matrices = list(shape.linears())
    table = (shape.vocab, shape.hidden)
    plain = 2 * (shape.parameters - shape.linear_parameters)
    if recipe is None or recipe.weights is None:
        return ModelBytes(0, 0, 0, plain + 2 * shape.linear_parameters)
    if not recipe.ignores("lm_head"):
        matrices.append(("lm_head", table))
        plain -= 0 if shape.tied else 2 * shape.vocab * shape.hidden
    if recipe.embeddings:
        matrices.append(("model.embed_tokens", table))
        plain -= 2 * shape.vocab * shape.hidden
        if shape.tied and recipe.ignores("lm_head"):
            plain += 2 * shape.vocab * shape.hidden  # the head keeps what it shared
    held = {"data": 0, "scale": 0, "zero_point": 0, "global_scale": 0}
    for name, (n, k) in matrices:
        if recipe.ignores(name):
            plain += 2 * n * k
            continue
        for part, count in part_bytes(torch.Size((n, k)), recipe.scheme_of(name), torch.bfloat16).items():
            held[part] += count
    return ModelBytes(held["data"], held["scale"] + held["global_scale"], held["zero_point"], plain)


def cache_bytes(shape: ModelShape, tokens: int, batch: int = 1, format: str | None = None) -> int:
    """Bytes of a KV cache that holds ``tokens`` of each of ``batch`` sequences, in 16 bits or in a cache format.

    It is what `QuantizedCache.nbytes` reads: the newest tokens, a window and those of a block that is not full, stay in
    16 bits, and the others are codes.
    Integers have a scale and an offset of 16 bits each, FP8 a scale alone: for keys by channel and block, for values by
    token and group of channels.

    Raises:
        CanopyError: for a format that does not exist.
    """
    checks.instance("shape", shape, ModelShape, "use MODEL_SHAPES or ModelShape.of(config)")
    checks.count("tokens", tokens), checks.count("batch", batch, 1)
    heads, dim = shape.layers * shape.kv_heads * batch, shape.head_dim
    if format is None:
        return heads * 2 * tokens * dim * 2
    codes = get_cache_format(format)
    blocks = max(0, tokens - KV_RESIDUAL_LENGTH) // KV_BLOCK
    waiting = tokens - blocks * KV_BLOCK
    scales = blocks * dim + blocks * KV_BLOCK * (dim // kv_group_size(dim))
    kept = 2 * blocks * KV_BLOCK * dim * codes.bits // 8 + scales * (2 if codes.is_float else 4)
    return heads * (kept + 2 * waiting * dim * 2)


def tensors_held(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a model holds, by name.

    Tensors that share storage appear once, and meta tensors, which hold nothing, not at all.
    """
    seen: set[int] = set()
    held = {}
    for name, tensor in [*checks.module("model", model).named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            continue
        if tensor.numel() and (key := tensor.untyped_storage().data_ptr()) not in seen:
            seen.add(key)
            held[name] = tensor
    return held


def bytes_held(model: nn.Module) -> int:
    """Bytes of storage behind a model's parameters and buffers, each storage counted once. Read, not computed."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_held(model).values())


def bytes_of(model: nn.Module) -> int:
    """Like `bytes_held`, but meta tensors count as what they would hold: of a model that lies elsewhere or nowhere."""
    ties, storages = meta_ties(model), {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[ties.get(storage._cdata, storage._cdata)] = storage.nbytes()
    return sum(storages.values())


def meta_ties(model: nn.Module) -> dict[int, int]:
    """Meta tensors that are another one by a second name -> that other one, by the identity of their storage:
    accelerate gives each name a meta tensor of its own."""
    pairs = getattr(model, "all_tied_weights_keys", None)
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for second, first in (pairs if isinstance(pairs, dict) else {}).items():
        one, other = named.get(second), named.get(first)
        if one is not None and other is not None and one.is_meta and other.is_meta:
            found[one.untyped_storage()._cdata] = other.untyped_storage()._cdata
    return found


def human(count: float) -> str:
    """A number of bytes in decimal units, as disk and model sizes are given: 1 GB = 10^9 bytes."""
    checks.number("count", count)
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * size:  # three digits of anything less stay below 1000 of the next unit
            return f"{count / size:.3g} {unit}" if abs(count) < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def peak_bytes() -> int:
    """The most memory that this process has held so far: what was resident, and what torch had allocated on GPUs."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its getrusage begins with what the parent process had
        resident = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1))
    else:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident = most if sys.platform == "darwin" else 1024 * most
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return resident + sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
