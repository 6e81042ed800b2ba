"""Attention of the newest tokens over a quantized KV cache, from its codes: `attend`."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import launch

BLOCK, GROUP = 64, 64  # tokens that share a key channel's scale; channels that share a value's
MOST_TOKENS = 16  # of one pass; for more, attention on dequantized keys is faster
CODES = {"kv8": 8, "kv4": 4, "kv2": 2, "kv-fp8": 0}  # the kernel's name of each format
THREADS = 128
REGISTERS = 65536  # of a multiprocessor
DECODE = "PPPPPPPPPPPPPiiiiiiiiiiif"
COMBINE = "PPPi"


def constants(format: str, head_dim: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """What the kernel is compiled for; ``rows`` are queries that share a key head."""
    tiles = 1 if rows <= 8 else 2
    return {
        "CODE": CODES[format],
        "HEAD_DIM": head_dim,
        "ELEMENT_BF16": int(dtype == torch.bfloat16),
        "ROW_TILES": tiles,
    }


def refuse(format: str, head_dim: int, dtype: torch.dtype, keys: str, group: int, device: torch.device) -> str | None:
    """Why the kernel cannot read such a cache, or None if it can.

    Args:
        keys: ``"channel"`` or ``"token"``, what a key's scale belongs to.
        group: channels of a token that share a scale.
    """
    if reason := launch.unavailable(device):
        return reason
    if format not in CODES:
        return f"it reads {', '.join(CODES)}; this cache is {format}"
    if head_dim not in (64, 128):
        return f"it takes heads of 64 or 128 channels; these have {head_dim}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16; these keys are {dtype}"
    if keys != "channel":
        return f"it reads keys with a scale per channel of a block; these have one per {keys}"
    if group != GROUP:
        return f"it reads values with a scale per {GROUP} channels; these have one per {group}"
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


@cache
def _functions(format: str, head_dim: int, dtype: torch.dtype, tiles: int, device: int) -> tuple:
    defined = constants(format, head_dim, dtype, 8 * tiles)
    return tuple(
        launch.Function("attention.cu", name, defined, letters, device, THREADS)
        for name, letters in (("attention_decode", DECODE), ("attention_combine", COMBINE))
    )


@torch.library.custom_op("canopyq::attend_codes", mutates_args=())
def attend(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_offset: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor,
    value_offset: Tensor | None,
    recent_keys: Tensor,
    recent_values: Tensor,
    format: str,
    scaling: float,
    starts: Tensor | None = None,
    before: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """softmax(q · Kᵀ · scaling) · V with causal mask, where the queries belong to the newest n tokens.

    Args:
        query: (B, heads, n, D) float16 or bfloat16, n at most 16, D 64 or 128.
        key_codes, value_codes: (B, kv_heads, T, D · bits / 8), T a multiple of 64, in the order of `kv_codes`.
        key_scale, key_offset: float16 (B, kv_heads, T / 64, D); offsets are None for kv-fp8.
        value_scale, value_offset: float16 (B, kv_heads, T, D / 64).
        recent_keys, recent_values: (B, kv_heads, R, D) in the query's dtype: the tokens after the quantized ones, the
            newest n included.
        format: kv8, kv4, kv2 or kv-fp8.
        starts: int32 (B,), how many of each row's first tokens are padding.
        before: int32 (1,), the number of tokens that came before these n. With it T and R are capacities, R a multiple
            of 64: a block is quantized once ``window`` more tokens have come, and recent tokens lie in a ring. Without
            it all T and R tokens are there.

    Returns:
        (B, n, heads, D) in the query's dtype, as transformers' attention functions return it.

    Raises:
        CanopyError: for shapes, dtypes, devices and layouts that do not fit together.
    """
    _check(query, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, recent_keys, recent_values,
           format, scaling, starts, before, window)  # fmt: skip
    batch, heads, tokens, head_dim = query.shape
    kv_heads, capacity, recent = key_codes.shape[1], key_codes.shape[2], recent_keys.shape[2]
    if not query.numel():
        return query.new_empty(batch, tokens, heads, head_dim)
    if query.stride(3) != 1 or query.data_ptr() % 16 or any(s % 8 for s in query.stride()[:3]):
        query = query.clone(memory_format=torch.contiguous_format)  # aligned too
    rows = heads // kv_heads * tokens
    tiles = 1 if rows <= 8 else 2
    row_tiles = -(-rows // (8 * tiles))
    device = query.device.index
    decode, combine = _functions(format, head_dim, query.dtype, tiles, device)
    resident = REGISTERS // (decode.registers * THREADS)
    splits = splits_for(capacity // BLOCK, batch * kv_heads * row_tiles, launch.multiprocessors(device), resident)
    out = query.new_empty(batch, tokens, heads, head_dim)
    partial = torch.empty(batch * tokens * heads, splits, head_dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(batch * tokens * heads, splits, 2, dtype=torch.float32, device=query.device)
    pointers = [
        0 if x is None else x.data_ptr()
        for x in (query, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, recent_keys,
                  recent_values, before, starts, partial, sums)
    ]  # fmt: skip
    decode(
        (kv_heads, batch * row_tiles, splits),
        *pointers, capacity, recent, heads // kv_heads, row_tiles, tokens, capacity, recent, window,
        *query.stride()[:3], scaling / math.log(2),
    )  # fmt: skip
    combine((batch * tokens * heads, 1, 1), partial.data_ptr(), sums.data_ptr(), out.data_ptr(), splits)
    return out


@attend.register_fake
def _(query, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, recent_keys, recent_values,
      format, scaling, starts=None, before=None, window=0):  # fmt: skip
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim)


def _check(query, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, recent_keys, recent_values,
           format, scaling, starts, before, window) -> None:  # fmt: skip
    if query.dim() != 4 or key_codes.dim() != 4 or recent_keys.dim() != 4:
        raise CanopyError("queries, codes and recent keys have four dimensions: batch, heads, tokens, channels")
    batch, heads, tokens, head_dim = query.shape
    kv_heads, capacity = key_codes.shape[1:3]
    if reason := refuse(format, head_dim, query.dtype, "channel", GROUP, query.device):
        raise CanopyError(f"attention on codes cannot run: {reason}")
    if tokens > MOST_TOKENS:
        raise CanopyError(f"attention on codes is for at most {MOST_TOKENS} new tokens, got {tokens}; dequantize")
    if not (kv_heads and heads % kv_heads == 0 and heads // kv_heads <= 128):
        raise CanopyError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
    if capacity % BLOCK:
        raise CanopyError(f"quantized tokens come in blocks of {BLOCK}, got {capacity}")
    if not (math.isfinite(scaling) and scaling > 0):
        raise CanopyError(f"the scaling of scores must be a positive number, got {scaling}")
    if window < 0 or (before is not None and recent_keys.shape[2] % BLOCK):
        raise CanopyError(f"a ring of recent tokens is a multiple of {BLOCK} long, got {recent_keys.shape[2]}")
    bits, dtype = CODES[format] or 8, torch.float8_e4m3fn if format == "kv-fp8" else torch.uint8
    codes, recent = (batch, kv_heads, capacity, head_dim * bits // 8), (batch, kv_heads, recent_keys.shape[2], head_dim)
    per_channel = (batch, kv_heads, capacity // BLOCK, head_dim)
    per_token = (batch, kv_heads, capacity, head_dim // GROUP)
    none = format == "kv-fp8"
    expected = {
        "key_codes": (key_codes, codes, dtype),
        "key_scale": (key_scale, per_channel, torch.float16),
        "key_offset": (key_offset, None if none else per_channel, torch.float16),
        "value_codes": (value_codes, codes, dtype),
        "value_scale": (value_scale, per_token, torch.float16),
        "value_offset": (value_offset, None if none else per_token, torch.float16),
        "recent_keys": (recent_keys, recent, query.dtype),
        "recent_values": (recent_values, recent, query.dtype),
    }
    if starts is not None:
        expected["starts"] = (starts, (batch,), torch.int32)
    if before is not None:
        expected["before"] = (before, (1,), torch.int32)
    for name, (x, shape, kind) in expected.items():
        if x is None or shape is None:
            if x is not None or shape is not None:
                raise CanopyError(f"{name} is {'missing' if x is None else 'for integer codes only'} with {format}")
        elif tuple(x.shape) != shape or x.dtype != kind:
            raise CanopyError(f"{name} should be {kind} {shape}, got {x.dtype} {tuple(x.shape)}")
        elif x.device != query.device:
            raise CanopyError(f"{name} lies on {x.device} and the queries on {query.device}; move them together")
        elif not x.is_contiguous() or x.data_ptr() % 16:
            raise CanopyError(f"{name} must be contiguous and begin at a multiple of 16 bytes; use .clone()")
