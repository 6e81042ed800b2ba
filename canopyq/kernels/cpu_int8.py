"""8-bit weights on the processor: torch's bfloat16-by-int8 kernel, and INT8 by INT8 with int32 sums.

A processor without an int8 dot product multiplies quantized inputs by the first of the two: bfloat16 has 8 significant
bits and holds every int8 code exactly.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from canopyq.kernels.spec import LinearSpec, PackedWeight
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.quantized_tensor import QuantizedTensor

VECTOR = 16


def _not_int8(spec: LinearSpec) -> str | None:
    fmt, granularity = spec.weights.format, spec.weights.granularity
    if not (isinstance(fmt, IntFormat) and fmt.bits == 8 and spec.weights.symmetric):
        return f"it takes symmetric int8 weights; these are {spec.weights}"
    if granularity.kind != "channel" or granularity.axis != 0:
        return f"it takes one scale for each output channel; these have one per {granularity}"
    return None


def unsupported_weight_only(spec: LinearSpec) -> str | None:
    if spec.activations is not None:
        return "it leaves activations in 16 bits, and this recipe quantizes them"
    if reason := _not_int8(spec):
        return reason
    if spec.weights.scale_dtype != torch.bfloat16:
        return f"it takes bfloat16 scales; these are {spec.weights.scale_dtype}"
    return _not_whole_vectors(spec)


def _not_whole_vectors(spec: LinearSpec) -> str | None:
    """torch._weight_int8pack_mm reads a row 16 values at a time (8 without AVX-512), past its end if need be."""
    return f"it takes in_features in multiples of {VECTOR}; this layer has {spec.k}" if spec.k % VECTOR else None


def weight_only(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """x · Wᵀ with x rounded to bfloat16: (M, K) -> (M, N)."""
    out = torch._weight_int8pack_mm(x.to(torch.bfloat16), packed["weight"], packed["weight_scale"].flatten())
    return out.to(x.dtype)


def not_codes(spec: LinearSpec) -> str | None:
    """Why 8-bit integer inputs cannot meet the weight, whatever multiplies them."""
    scheme = spec.activations
    if scheme is None:
        return "it multiplies integers by integers, and this recipe leaves activations as they are"
    if not (isinstance(scheme.format, IntFormat) and scheme.format.bits == 8):
        return f"it takes int8 activations; these are {scheme}"
    if scheme.granularity.kind not in ("token", "tensor"):
        return f"it takes one input scale for each token or one in all; these have one per {scheme.granularity}"
    return _not_int8(spec)


def unsupported_int8(spec: LinearSpec) -> str | None:
    if reason := not_codes(spec) or sums_overflow(spec):
        return reason
    if not torch.cpu._is_vnni_supported():
        return "this processor has no int8 dot product (VNNI), and without it integers are slower than float32"
    if spec.k < 2:
        return "torch's product of integers is wrong for one input feature"
    if not products_are_exact():
        return "torch's product of integers saturates here, as oneDNN's does without an int8 dot product (VNNI)"
    return None


@cache
def products_are_exact() -> bool:
    """Whether torch._int_mm holds the largest products there are. Without VNNI, be it that the processor has none or
    that ONEDNN_MAX_CPU_ISA hides it, oneDNN adds two of them in 16 bits, where they saturate."""
    x, w = torch.full((16, 64), 127, dtype=torch.int8), torch.full((64, 16), -128, dtype=torch.int8)
    return bool((torch._int_mm(x, w) == 64 * 127 * -128).all() and (torch._int_mm(-x, w) == 64 * 127 * 128).all())


def sums_overflow(spec: LinearSpec) -> str | None:
    """Codes and zero points are at most 128, so |Σ(q − z)·w| ≤ K · 255 · 128 has to fit in int32."""
    return f"sums of {spec.k} products may not fit in 32 bits" if spec.k > 2**31 // 2**15 else None


def unsupported_bfloat16(spec: LinearSpec) -> str | None:
    return not_codes(spec) or _not_whole_vectors(spec)


def int8_by_int8(x: QuantizedTensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """(Q − z)·s · (Wq·w)ᵀ = (Q·Wqᵀ − z·ΣWq) · s·w, sums in int32: (M, K) -> (M, N) in x's dtype."""
    codes = packed["weight"]
    return epilogue(torch._int_mm(x.data, codes.t()), x, codes, packed["weight_scale"])


def epilogue(sums: Tensor, x: QuantizedTensor, codes: Tensor, scale: Tensor) -> Tensor:
    """From int32 sums (M, N) of code products to the layer's output: the zero-point correction, exact in int32, then
    the scales of token and channel."""
    if x.zero_point is not None:
        sums -= x.zero_point.to(torch.int32).reshape(-1, 1) * codes.sum(1, dtype=torch.int32)
    out = sums * x.scale.to(torch.float32).reshape(-1, 1)
    return out.mul_(scale.to(torch.float32).t()).to(x.dtype)


def codes_in_bfloat16(x: QuantizedTensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """The same with float32 sums, rounded to bfloat16 once: (M, K) -> (M, N) in x's dtype."""
    codes = x.data.to(torch.bfloat16)
    if x.zero_point is not None:
        codes -= x.zero_point.reshape(-1, 1)  # in −255…255, which bfloat16 holds too
    sums = torch._weight_int8pack_mm(codes, packed["weight"], torch.ones(spec.n, dtype=torch.bfloat16))
    out = sums * x.scale.to(torch.float32).reshape(-1, 1)
    return out.mul_(packed["weight_scale"].to(torch.float32).t()).to(x.dtype)
