"""The small operations of one decoding step: what stands between the matrix products of a Llama block.

Each is a torch op with a PyTorch implementation, which says what is meant, and on a GPU one kernel. In a step of one
token they move a few kilobytes each; what they cost is their number, so that each does all there is to do at its place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm_reference(residual: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add ``change`` to the residual stream (B, H) in place, and return its RMS norm times ``weight`` (H,).

    Sums are formed in float32 and rounded to the residual's dtype first, as transformers does.
    """
    if change is not None:
        residual += change
    wide = residual.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(residual.dtype)


add_rms_norm = torch.library.custom_op("canopyq::add_rms_norm", add_rms_norm_reference, mutates_args=("residual",))


@add_rms_norm.register_fake
def _(residual: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(residual)


def rotate_and_append_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Split ``qkv`` (B, (Hq + 2 Hkv) · D) of one token a sequence, rotate queries and keys to ``position`` (rotary
    embedding, halves of a head paired), and write keys and values into the cache at that place modulo its length.

    Args:
        cos, sin: (L, D / 2) float32, of every position.
        position: (1,) int64, where the token stands; the same for all sequences.
        keys, values: (B, Hkv, L, D).

    Returns:
        the rotated queries (B, Hq, D).
    """
    batch, kv_heads, _, d = keys.shape
    heads = qkv.shape[1] // d - 2 * kv_heads
    q, k, v = qkv.view(batch, -1, d).split([heads, kv_heads, kv_heads], dim=1)
    c, s = cos[position].to(qkv.dtype), sin[position].to(qkv.dtype)
    place = position % keys.shape[2]
    keys.index_copy_(2, place, _rotate(k, c, s).unsqueeze(2))
    values.index_copy_(2, place, v.unsqueeze(2))
    return _rotate(q, c, s)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


rotate_and_append = torch.library.custom_op(
    "canopyq::rotate_and_append", rotate_and_append_reference, mutates_args=("keys", "values")
)


@rotate_and_append.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    batch, kv_heads, _, d = keys.shape
    return qkv.new_empty(batch, qkv.shape[1] // d - 2 * kv_heads, d)


def attend_reference(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Attention of one token a sequence over the cache up to and including ``position`` (1,).

    Args:
        q: (B, Hq, D). keys, values: (B, Hkv, L, D), Hkv a divisor of Hq.

    Returns:
        (B, Hq · D) in q's dtype.
    """
    batch, heads, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.view(batch, keys.shape[1], -1, d).to(wide)
    later = torch.arange(keys.shape[2], device=q.device) > position
    scores = (grouped @ keys.to(wide).transpose(-1, -2) * d**-0.5).masked_fill(later, float("-inf"))
    seen = values.to(wide).masked_fill(later.unsqueeze(-1), 0.0)  # what was not written yet may be anything
    return (scores.softmax(-1) @ seen).to(q.dtype).reshape(batch, heads * d)


attend = torch.library.custom_op("canopyq::attend", attend_reference, mutates_args=())


@attend.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of ``gate_up`` (B, 2 I), gate first: (B, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


silu_mul = torch.library.custom_op("canopyq::silu_mul", silu_mul_reference, mutates_args=())


@silu_mul.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
