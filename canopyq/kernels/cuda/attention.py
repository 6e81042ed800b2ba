"""Attention of the newest tokens over a quantized KV cache, from its codes: `attend`."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.kernels.cuda import launch
from canopyq.tensor.formats import CACHE_FORMATS, KV_BLOCK, KV_GROUP_SIZE, CacheFormat, get_cache_format

if TYPE_CHECKING:
    from canopyq.kv_cache.quantized_kv import KVView

MAX_QUERY_TOKENS = 16  # of one pass; for more, attention on dequantized keys is faster
THREADS = 128
REGISTERS = 65536  # of a multiprocessor
DECODE = "PPPPPPPPPPPPPiiiiiiiiiiif"
COMBINE = "PPPi"


def code_constant(format: CacheFormat) -> int:
    """What the CUDA sources call a format: its bits, and 0 for E4M3."""
    return 0 if format.is_float else format.bits


def constants(format: CacheFormat, head_dim: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """What the kernel is compiled for; ``rows`` are queries that share a key head."""
    return {
        "CODE": code_constant(format),
        "HEAD_DIM": head_dim,
        "ELEMENT_BF16": int(dtype == torch.bfloat16),
        "ROW_TILES": 1 if rows <= 8 else 2,
    }


def unsupported_reason(
    format: CacheFormat,
    head_dim: int,
    dtype: torch.dtype,
    key_granularity: str,
    group_size: int,
    device: torch.device,
) -> str | None:
    """Why the kernel cannot read such a cache, or None if it can.

    Args:
        key_granularity: ``"channel"`` or ``"token"``, what a key's scale belongs to.
        group_size: channels of a token that share a scale.
    """
    if reason := launch.unavailable(device):
        return reason
    if format not in CACHE_FORMATS.values():
        return f"it reads {', '.join(CACHE_FORMATS)}; this cache is {format.name}"
    if head_dim not in (64, 128):
        return f"it takes heads of 64 or 128 channels; these have {head_dim}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16; these keys are {dtype}"
    if key_granularity != "channel":
        return f"it reads keys with a scale per channel of a block; these have one per {key_granularity}"
    if group_size != KV_GROUP_SIZE:
        return f"it reads values with a scale per {KV_GROUP_SIZE} channels; these have one per {group_size}"
    return None


def splits_for(blocks: int, jobs: int, multiprocessors: int, resident: int) -> int:
    """Into how many parts to cut the context of each of ``jobs`` (batch entry, key head, row tile).

    A multiprocessor that gets more parts than others, or longer ones, ends last. Of the cuts that come close to the
    least such load, the finest is taken, since loads of many warps hide each other's latency; a part keeps four blocks,
    one for each warp, and all parts run at once if they can.
    """
    most = max(1, min(-(-blocks // 4), multiprocessors * resident // jobs))
    load = {n: -(-jobs * n // multiprocessors) * -(-blocks // n) for n in range(1, most + 1)}
    least = min(load.values())
    return max(n for n, value in load.items() if value <= 1.05 * least)


def attend(query: Tensor, view: KVView, scaling: float, starts: Tensor | None = None) -> Tensor:
    """softmax(q · Kᵀ · scaling) · V with causal mask, where the queries belong to the newest n tokens.

    Args:
        query: (B, heads, n, D) float16 or bfloat16, n at most 16, D 64 or 128.
        view: the keys and values, in the query's dtype where they are recent; keys with a scale per channel.
        starts: int32 (B,), how many of each row's first tokens are padding.

    Returns:
        (B, n, heads, D) in the query's dtype, as transformers' attention functions return it.

    Raises:
        CanopyError: for a view that the kernel cannot read, and queries that do not fit it.
    """
    keys, values = view.quantized_keys, view.quantized_values
    if keys.granularity != "channel":
        raise CanopyError(f"attention on codes reads keys with a scale per channel, not per {keys.granularity}")
    tensors = [*keys.tensors, *values.tensors, view.keys.contiguous(), view.values.contiguous()]
    return attend_codes(query, tensors, keys.format.name, scaling, starts, view.before, view.residual_length)


@torch.library.custom_op("canopyq::attend_codes", mutates_args=())
def attend_codes(
    query: Tensor,
    cache: list[Tensor],
    format: str,
    scaling: float,
    starts: Tensor | None = None,
    before: Tensor | None = None,
    residual_length: int = 0,
) -> Tensor:
    """`attend` as an operator. ``cache``: the tensors of a `KVView`, contiguous, the keys with scales per channel."""
    _check(query, cache, get_cache_format(format), scaling, starts)
    batch, heads, tokens, head_dim = query.shape
    kv_heads, capacity, recent = cache[0].shape[1], cache[0].shape[2], cache[-1].shape[2]
    if not query.numel():
        return query.new_empty(batch, tokens, heads, head_dim)
    if query.stride(3) != 1 or query.data_ptr() % 16 or any(s % 8 for s in query.stride()[:3]):
        query = query.clone(memory_format=torch.contiguous_format)  # aligned too
    rows = heads // kv_heads * tokens
    tiles = 1 if rows <= 8 else 2
    row_tiles = -(-rows // (8 * tiles))
    device = query.device.index
    decode, combine = _functions(get_cache_format(format), head_dim, query.dtype, tiles, device)
    resident = REGISTERS // (decode.registers * THREADS)
    splits = splits_for(capacity // KV_BLOCK, batch * kv_heads * row_tiles, launch.multiprocessors(device), resident)
    out = query.new_empty(batch, tokens, heads, head_dim)
    partial = torch.empty(batch * tokens * heads, splits, head_dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(batch * tokens * heads, splits, 2, dtype=torch.float32, device=query.device)
    numbers = [0 if x is None else x.data_ptr() for x in (before, starts)]
    decode(
        (kv_heads, batch * row_tiles, splits),
        query.data_ptr(), *pointers(cache, get_cache_format(format)), *numbers, partial.data_ptr(), sums.data_ptr(),
        capacity, recent, heads // kv_heads, row_tiles, tokens, capacity, recent, residual_length,
        *query.stride()[:3], scaling / math.log(2),
    )  # fmt: skip
    combine((batch * tokens * heads, 1, 1), partial.data_ptr(), sums.data_ptr(), out.data_ptr(), splits)
    return out


@attend_codes.register_fake
def _(query, cache, format, scaling, starts=None, before=None, residual_length=0):
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim)


def pointers(cache: list[Tensor], format: CacheFormat) -> list[int]:
    """Addresses of the tensors of a `KVView`, as the CUDA sources expect them: codes, scale and offset of keys and of
    values, 0 for an offset that floats do not have; recent keys and values."""
    found = [x.data_ptr() for x in cache]
    return [*found[:2], 0, *found[2:4], 0, *found[4:]] if format.is_float else found


@cache
def _functions(format: CacheFormat, head_dim: int, dtype: torch.dtype, tiles: int, device: int) -> tuple:
    defined = constants(format, head_dim, dtype, 8 * tiles)
    return tuple(
        launch.Function("attention.cu", name, defined, letters, device, THREADS)
        for name, letters in (("attention_decode", DECODE), ("attention_combine", COMBINE))
    )


def _check(query: Tensor, cache: list[Tensor], format: CacheFormat, scaling: float, starts: Tensor | None) -> None:
    """Refuse what the kernel cannot read, and queries that do not fit the cache; a `KVView` has checked itself."""
    recent, value_scale = cache[-1], cache[3 if format.is_float else 4]
    checks.operand("query", query, (len(recent), None, None, recent.shape[3]), recent.dtype, recent.device)
    batch, heads, tokens, head_dim = query.shape
    group_size = recent.shape[3] // value_scale.shape[3]
    if reason := unsupported_reason(format, head_dim, query.dtype, "channel", group_size, query.device):
        raise CanopyError(f"attention on codes cannot run: {reason}")
    if tokens > MAX_QUERY_TOKENS:
        raise CanopyError(f"attention on codes is for at most {MAX_QUERY_TOKENS} new tokens, got {tokens}; dequantize")
    kv_heads = recent.shape[1]
    if not (kv_heads and heads % kv_heads == 0 and heads // kv_heads <= 128):
        raise CanopyError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
    checks.operand("recent keys", cache[-2], recent.shape, recent.dtype, recent.device)
    if not (math.isfinite(scaling) and scaling > 0):
        raise CanopyError(f"the scaling of scores must be a positive number, got {scaling}")
    if starts is not None:
        checks.operand("starts", starts, (batch,), torch.int32, query.device)
    for x in cache:
        if not x.is_contiguous() or x.data_ptr() % 16:
            raise CanopyError(
                f"the cache's {x.dtype} tensor {tuple(x.shape)} must be contiguous and begin at a multiple of 16 "
                "bytes; use .clone()"
            )
