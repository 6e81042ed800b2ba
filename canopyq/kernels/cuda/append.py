"""New tokens of a KV cache of fixed size, into a ring and block by block to codes: `append`, on GPU or processor."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import launch
from canopyq.kernels.cuda.attention import CODES
from canopyq.tensor.kv_codes import BLOCK, QuantizedStates, get_cache_format

WRITTEN = ("recent_keys", "recent_values", "key_codes", "key_scale", "key_offset", "value_codes", "value_scale",
           "value_offset")  # fmt: skip


@cache
def _append(format: str, head_dim: int, dtype: torch.dtype, device: int) -> launch.Function:
    defined = {"CODE": CODES[format], "HEAD_DIM": head_dim, "ELEMENT_BF16": int(dtype == torch.bfloat16)}
    return launch.Function("append.cu", "append", defined, "P" * 11 + "i" * 10, device, 128)


@torch.library.custom_op("canopyq::append", mutates_args=WRITTEN, device_types="cuda")
def append(
    keys: Tensor,
    values: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_offset: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor,
    value_offset: Tensor | None,
    before: Tensor,
    format: str,
    window: int,
) -> None:
    """Write tokens (B, kv_heads, n, D) where `attention.attend` with ``before`` reads them.

    Blocks that are followed by ``window`` tokens become codes, once and for good; this pass still reads them from the
    ring. NaN and infinity are not looked for. Tokens for which there is no room are not written.
    """
    _check(keys, values, recent_keys, key_codes, before, format)
    batch, heads, count, head_dim = keys.shape
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    written = (key_codes, key_scale, key_offset, value_codes, value_scale, value_offset)
    places = (keys, values, recent_keys, recent_values, *written, before)
    pointers = [0 if x is None else x.data_ptr() for x in places]
    sizes = (count, key_codes.shape[2], recent_keys.shape[2], window)
    run = _append(format, head_dim, keys.dtype, keys.device.index)
    run((heads, batch, 2), *pointers, *sizes, *keys.stride()[:3], *values.stride()[:3])


@append.register_kernel("cpu")
def _(keys, values, recent_keys, recent_values, key_codes, key_scale, key_offset, value_codes, value_scale,
      value_offset, before, format, window):  # fmt: skip
    _check(keys, values, recent_keys, key_codes, before, format)
    start, count, ring = int(before), keys.shape[2], recent_keys.shape[2]
    if start + count > key_codes.shape[2]:
        return
    slots = torch.arange(start, start + count) % ring
    recent_keys[:, :, slots], recent_values[:, :, slots] = keys, values
    first, last = (max(n - window, 0) // BLOCK for n in (start, start + count))
    for block in range(first, last):
        place = slice(block * BLOCK % ring, block * BLOCK % ring + BLOCK)
        store(recent_keys[:, :, place], block * BLOCK, format, "channel", key_codes, key_scale, key_offset)
        store(recent_values[:, :, place], block * BLOCK, format, "token", value_codes, value_scale, value_offset)


@append.register_fake
def _(*_: object) -> None:
    return None


def store(x: Tensor, token: int, format: str, per: str, codes: Tensor, scale: Tensor, offset: Tensor | None) -> None:
    """Quantize whole blocks (B, kv_heads, T, D) and write them from a token on, itself a multiple of 64."""
    states = QuantizedStates.quantize(x, get_cache_format(format), per)
    for to, made in zip((codes, scale, offset), states.tensors, strict=False):
        start = token * made.shape[2] // x.shape[2]
        to[:, :, start : start + made.shape[2]] = made


def _check(keys: Tensor, values: Tensor, recent: Tensor, codes: Tensor, before: Tensor, format: str) -> None:
    batch, heads, count, head_dim = keys.shape
    bits = CODES[format] or 8
    if values.shape != keys.shape or keys.dtype != recent.dtype or values.dtype != recent.dtype:
        raise CanopyError(
            f"new keys and values are {recent.dtype} of one shape, got {keys.dtype} {tuple(keys.shape)} and "
            f"{values.dtype} {tuple(values.shape)}"
        )
    given = (batch, heads, head_dim * bits // 8)
    if (*codes.shape[:2], codes.shape[3]) != given or recent.shape[:2] != codes.shape[:2]:
        raise CanopyError(
            f"the cache is for {codes.shape[0]} sequences of {codes.shape[1]} heads in {format}, got keys "
            f"{tuple(keys.shape)}"
        )
    if recent.shape[2] % BLOCK or codes.shape[2] % BLOCK or count > recent.shape[2]:
        raise CanopyError(f"{count} tokens at a time are more than the ring of {recent.shape[2]} takes")
    if before.dtype != torch.int32 or before.numel() != 1 or before.device != keys.device:
        raise CanopyError(f"the number of tokens is one int32 on {keys.device}, got {before.dtype} on {before.device}")
