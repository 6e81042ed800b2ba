"""8-bit weights on the processor: torch's bfloat16-by-int8 kernel, and INT8 by INT8 with int32 sums.

A processor without an int8 dot product multiplies quantized inputs by the first of the two: bfloat16 has 8 significant
bits and holds every int8 code exactly.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from canopyq.kernels.kernel import Held, Kernel, Problem, up_to
from canopyq.kernels.reference import PLAIN
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.quantized_tensor import QuantizedTensor

VECTOR = 16


def _elsewhere(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"it is a processor's kernel; the layer lies on {problem.device}"
    return None


def _not_int8(problem: Problem) -> str | None:
    fmt, granularity = problem.weights.format, problem.weights.granularity
    if not (isinstance(fmt, IntFormat) and fmt.bits == 8 and problem.weights.symmetric):
        return f"it takes symmetric int8 weights; these are {problem.weights}"
    if granularity.kind != "channel" or granularity.axis != 0:
        return f"it takes one scale for each output channel; these have one per {granularity}"
    return None


def refuse_weight_only(problem: Problem) -> str | None:
    if problem.activations is not None:
        return "it leaves activations in 16 bits, and this recipe quantizes them"
    if reason := _elsewhere(problem) or _not_int8(problem):
        return reason
    if problem.weights.scale_dtype != torch.bfloat16:
        return f"it takes bfloat16 scales; these are {problem.weights.scale_dtype}"
    return _not_whole_vectors(problem)


def _not_whole_vectors(problem: Problem) -> str | None:
    """torch._weight_int8pack_mm reads a row 16 values at a time (8 without AVX-512), past its end if need be."""
    return f"it takes in_features in multiples of {VECTOR}; this layer has {problem.k}" if problem.k % VECTOR else None


def weight_only(x: Tensor, held: Held, problem: Problem) -> Tensor:
    """x · Wᵀ with x rounded to bfloat16: (M, K) -> (M, N)."""
    out = torch._weight_int8pack_mm(x.to(torch.bfloat16), held["weight"], held["weight_scale"].flatten())
    return out.to(x.dtype)


def not_codes(problem: Problem) -> str | None:
    """Why 8-bit integer inputs cannot meet the weight, whatever multiplies them."""
    scheme = problem.activations
    if scheme is None:
        return "it multiplies integers by integers, and this recipe leaves activations as they are"
    if not (isinstance(scheme.format, IntFormat) and scheme.format.bits == 8):
        return f"it takes int8 activations; these are {scheme}"
    if scheme.granularity.kind not in ("token", "tensor"):
        return f"it takes one input scale for each token or one in all; these have one per {scheme.granularity}"
    return _not_int8(problem)


def refuse_int8(problem: Problem) -> str | None:
    if reason := _elsewhere(problem) or not_codes(problem) or sums_overflow(problem):
        return reason
    if not torch.cpu._is_vnni_supported():
        return "this processor has no int8 dot product (VNNI), and without it integers are slower than float32"
    if problem.k < 2:
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


def sums_overflow(problem: Problem) -> str | None:
    """Codes and zero points are at most 128, so |Σ(q − z)·w| ≤ K · 255 · 128 has to fit in int32."""
    return f"sums of {problem.k} products may not fit in 32 bits" if problem.k > 2**31 // 2**15 else None


def refuse_codes(problem: Problem) -> str | None:
    return _elsewhere(problem) or not_codes(problem) or _not_whole_vectors(problem)


def int8_by_int8(x: QuantizedTensor, held: Held, problem: Problem) -> Tensor:
    """(Q − z)·s · (Wq·w)ᵀ = (Q·Wqᵀ − z·ΣWq) · s·w, sums in int32: (M, K) -> (M, N) in x's dtype."""
    codes = held["weight"]
    return epilogue(torch._int_mm(x.data, codes.t()), x, codes, held["weight_scale"])


def epilogue(sums: Tensor, x: QuantizedTensor, codes: Tensor, scale: Tensor) -> Tensor:
    """From int32 sums (M, N) of code products to the layer's output: the zero-point correction, exact in int32, then
    the scales of token and channel."""
    if x.zero_point is not None:
        sums -= x.zero_point.to(torch.int32).reshape(-1, 1) * codes.sum(1, dtype=torch.int32)
    out = sums * x.scale.to(torch.float32).reshape(-1, 1)
    return out.mul_(scale.to(torch.float32).t()).to(x.dtype)


def codes_in_bfloat16(x: QuantizedTensor, held: Held, problem: Problem) -> Tensor:
    """The same with float32 sums, rounded to bfloat16 once: (M, K) -> (M, N) in x's dtype."""
    codes = x.data.to(torch.bfloat16)
    if x.zero_point is not None:
        codes -= x.zero_point.reshape(-1, 1)  # in −255…255, which bfloat16 holds too
    sums = torch._weight_int8pack_mm(codes, held["weight"], torch.ones(problem.n, dtype=torch.bfloat16))
    out = sums * x.scale.to(torch.float32).reshape(-1, 1)
    return out.mul_(held["weight_scale"].to(torch.float32).t()).to(x.dtype)


WEIGHT_ONLY = Kernel(
    "packed int8, bfloat16 input (torch)", PLAIN, refuse_weight_only, weight_only, rows=up_to(16), example="w8a16"
)
INT8 = Kernel("int8 by int8, int32 sums (torch)", PLAIN, refuse_int8, int8_by_int8, example="w8a8", takes_codes=True)
CODES = Kernel(
    "int8 codes held in bfloat16 by int8 (torch)",
    PLAIN,
    refuse_codes,
    codes_in_bfloat16,
    up_to(16),
    "w8a8",
    takes_codes=True,
)
