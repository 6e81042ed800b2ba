"""Dequantize a tile of rows that fits in the processor's cache, multiply by it, go on to the next.

The weight never lies in memory in full precision, and writing and reading it there is what the reference spends most
of its time on. Sums are formed in float32 whatever the input's dtype: most processors multiply bfloat16 far slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq.kernels.reference import unpack
from canopyq.kernels.spec import LinearSpec, PackedWeight
from canopyq.tensor.formats import e4m3_to_float
from canopyq.tensor.quantized_tensor import QuantizedTensor

TILE = 2**20  # weights dequantized at a time: 4 MB of float32


def unsupported(spec: LinearSpec) -> str | None:
    granularity = spec.weights.granularity
    if granularity.kind == "channel" and granularity.axis != 0:
        return "its slices are rows, and this weight's scales belong to columns"
    return None


def linear(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """x · Wᵀ: (M, K) -> (M, N)."""
    weight = unpack(packed, spec)
    wide = x.to(torch.float32)
    out = torch.empty(len(x), spec.n, dtype=torch.float32)
    rows = max(1, min(spec.n, TILE // spec.k))
    scratch = torch.empty(rows, spec.k) if _is_a_byte_each(weight) else None
    for start in range(0, spec.n, rows):
        part = _rows(weight, start, min(start + rows, spec.n))
        values = part.dequantize(torch.float32) if scratch is None else _byte_values(part, scratch)
        torch.mm(wide, values.t(), out=out[:, start : start + rows])
    return out.to(x.dtype)


def _rows(weight: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Rows start…stop of a weight (N, K), sharing memory."""

    def cut(part: Tensor | None) -> Tensor | None:
        return part[start:stop] if part is not None and part.dim() == 2 else part

    return QuantizedTensor(
        weight.data[start:stop],
        cut(weight.scale),
        cut(weight.zero_point),
        weight.scheme,
        torch.Size([stop - start, weight.shape[1]]),
        weight.dtype,
        weight.global_scale,
    )


def _is_a_byte_each(weight: QuantizedTensor) -> bool:
    fmt, granularity = weight.scheme.format, weight.scheme.granularity
    return fmt.bits == 8 and weight.scale is not None and not granularity.padding(weight.shape)


def _byte_values(part: QuantizedTensor, scratch: Tensor) -> Tensor:
    """What `dequantize` gives, integers in ``scratch``: codes that need no unpacking are two passes, or three."""
    n, k = part.shape
    scale = part.scale.to(torch.float32)
    if part.data.dtype == torch.float8_e4m3fn:  # a weight holds no NaN
        values, scale = e4m3_to_float(part.data), scale * 256
    else:
        values = scratch[:n].copy_(part.data)
    grouped = values.view(n, scale.shape[1] if scale.dim() == 2 else 1, -1)
    if part.zero_point is not None:
        grouped.sub_(part.zero_point.unsqueeze(-1))
    grouped.mul_(scale.unsqueeze(-1))
    return values
