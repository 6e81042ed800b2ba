"""Attention that reads the codes of a KV cache, in PyTorch, with as few passes over them as there can be.

What scales and offsets do is done to something smaller where that is possible. A block's key offsets meet the query
once for all its tokens, q · (s ∘ u + o) = q · (s ∘ u) + q · o, and a value token's scale and offset go to its
probability: Σ p (s u + o) = Σ (p s) u + Σ p o.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from canopyq.tensor.formats import KV_BLOCK

if TYPE_CHECKING:
    from canopyq.kv_cache.quantized_kv import KVView, QuantizedKV


def unsupported_reason(query_dtype: torch.dtype, key_granularity: str, device: torch.device) -> str | None:
    """Why these operations are not the way to read a cache, or None if they are."""
    if device.type != "cpu":
        return f"it is for the CPU; these keys lie on {device}"
    if query_dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 or float64; these queries are {query_dtype}"
    if key_granularity != "channel":
        return f"it reads keys with a scale per channel of a block; these have one per {key_granularity}"
    return None


def attend(query: Tensor, view: KVView, scaling: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q · Kᵀ · scaling) · V, where the queries belong to the newest n tokens.

    Args:
        query: (B, heads, n, D) float32 or float64, in which all is computed.
        view: of a growing cache, some of it as codes, its keys with scales per channel.
        mask: bool (B or 1, 1, n, tokens), what each query sees; None for all that is not after it.

    Returns:
        (B, n, heads, D), as transformers' attention functions return it.
    """
    batch, heads, n, dim = query.shape
    keys, values = view.quantized_keys, view.quantized_values
    q = (query * scaling).reshape(batch, view.keys.shape[1], -1, dim)  # those that share a key head together
    scores = torch.cat([*(_scores(q, part) for _, part in keys.tiles()), q @ view.keys.transpose(2, 3)], 3)
    if mask is None and n > 1:
        place = torch.arange(scores.shape[3])
        mask = place <= (scores.shape[3] - n + torch.arange(n))[:, None]
    if mask is not None:
        scores = scores.reshape(batch, heads, n, -1).masked_fill(~mask, float("-inf")).reshape(scores.shape)
    p = scores.softmax(-1)
    out = p[..., keys.tokens :] @ view.values
    for start, part in values.tiles():
        out += _weighted(p[..., start : start + part.tokens], part)
    return out.reshape(batch, heads, n, dim).transpose(1, 2)


def _scores(q: Tensor, keys: QuantizedKV) -> Tensor:
    """q · x̂ᵀ: (B, H, m, D) -> (B, H, m, T)."""
    codes, scale = keys.unscaled(q.dtype)
    codes = codes.unflatten(2, (-1, KV_BLOCK)).mul_(scale.unsqueeze(3)).flatten(2, 3)
    scores = q @ codes.transpose(2, 3)
    if keys.offset is not None:
        scores.unflatten(3, (-1, KV_BLOCK)).add_((q @ keys.offset.to(q.dtype).transpose(2, 3)).unsqueeze(4))
    return scores


def _weighted(p: Tensor, values: QuantizedKV) -> Tensor:
    """p · x̂: (B, H, m, T) -> (B, H, m, D)."""
    codes, scale = values.unscaled(p.dtype)
    groups = scale.shape[3]
    if groups == 1:
        out = (p * scale.transpose(2, 3)) @ codes
    else:
        out = p @ codes.unflatten(3, (groups, -1)).mul_(scale.unsqueeze(4)).flatten(3)
    if values.offset is not None:
        out = (out.unflatten(3, (groups, -1)) + (p @ values.offset.to(p.dtype)).unsqueeze(4)).flatten(3)
    return out
