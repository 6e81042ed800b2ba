"""8-bit weights on the processor: torch's bfloat16-by-int8 kernel, and INT8 by INT8 with int32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq.formats import IntFormat
from canopyq.ops.kernel import Held, Kernel, Problem
from canopyq.ops.reference import PLAIN
from canopyq.tensor import QuantizedTensor


def _not_int8(problem: Problem) -> str | None:
    fmt, granularity = problem.weights.format, problem.weights.granularity
    if problem.device.type != "cpu":
        return f"it is a processor's kernel; the layer lies on {problem.device}"
    if not (isinstance(fmt, IntFormat) and fmt.bits == 8 and problem.weights.symmetric):
        return f"it takes symmetric int8 weights; these are {problem.weights}"
    if granularity.kind != "channel" or granularity.axis != 0:
        return f"it takes one scale for each output channel; these have one per {granularity}"
    return None


def refuse_weight_only(problem: Problem) -> str | None:
    if problem.activations is not None:
        return "it leaves activations in 16 bits, and this recipe quantizes them"
    if reason := _not_int8(problem):
        return reason
    if problem.weights.scale_dtype != torch.bfloat16:
        return f"it takes bfloat16 scales; these are {problem.weights.scale_dtype}"
    return None


def weight_only(x: Tensor, held: Held, problem: Problem) -> Tensor:
    """x · Wᵀ with x rounded to bfloat16: (M, K) -> (M, N)."""
    out = torch._weight_int8pack_mm(x.to(torch.bfloat16), held["weight"], held["weight_scale"].flatten())
    return out.to(x.dtype)


def refuse_int8(problem: Problem) -> str | None:
    scheme = problem.activations
    if scheme is None:
        return "it multiplies integers by integers, and this recipe leaves activations as they are"
    if not (isinstance(scheme.format, IntFormat) and scheme.format.bits == 8):
        return f"it takes int8 activations; these are {scheme}"
    if reason := _not_int8(problem):
        return reason
    if problem.k > 2**31 // 2**15:
        return f"sums of {problem.k} products of int8 and int8 may not fit in 32 bits"
    if not torch.cpu._is_vnni_supported():
        return "this processor has no int8 dot product (VNNI), and without it integers are slower than float32"
    return None


def int8_by_int8(x: QuantizedTensor, held: Held, problem: Problem) -> Tensor:
    """(Q − z)·s · (Wq·w)ᵀ = (Q·Wqᵀ − z·ΣWq) · s·w, sums in int32: (M, K) -> (M, N) in x's dtype."""
    codes, scale = held["weight"], held["weight_scale"].to(torch.float32)
    sums = torch._int_mm(x.data, codes.t())
    if x.zero_point is not None:
        sums -= x.zero_point.to(torch.int32).reshape(-1, 1) * codes.sum(1, dtype=torch.int32)
    return (sums * x.step().reshape(-1, 1) * scale.t()).to(x.dtype)


WEIGHT_ONLY = Kernel("packed int8, bfloat16 input (torch)", PLAIN, refuse_weight_only, weight_only, most_rows=8)
INT8 = Kernel("int8 by int8, int32 sums (torch)", PLAIN, refuse_int8, int8_by_int8, takes_codes=True)
