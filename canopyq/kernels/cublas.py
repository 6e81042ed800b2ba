"""8 bits by 8 bits on an NVIDIA GPU, by the matrix products that torch takes from cuBLAS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from canopyq.kernels import cpu_int8, reference
from canopyq.kernels.cuda import eight_bits, launch
from canopyq.kernels.kernel import ANY, Held, Kernel, Layout, Problem
from canopyq.tensor.quantized_tensor import QuantizedTensor

FEWEST_ROWS = 17  # torch._int_mm refuses fewer
FP8_FROM = (8, 9)  # compute capability: Ada and Hopper have FP8 tensor cores
ROWWISE_FROM = (9, 0)  # and from Hopper on cuBLAS applies a scale per row and column itself


def arrange(weight: QuantizedTensor) -> dict[str, Tensor]:
    """As in the checkpoint, but scales as products need them: to convert them takes as long as a small product."""
    held = reference.arrange(weight)
    if weight.scheme.scale_dtype is not None:
        held["weight_scale"] = held["weight_scale"].to(torch.float32)
    return held


def restore(held: Held, problem: Problem) -> QuantizedTensor:
    """The inverse of `arrange`, bit for bit: float32 holds every narrower scale."""
    scale = held["weight_scale"].to(problem.weights.scale_dtype or held["weight_scale"].dtype)
    return reference.restore({**held, "weight_scale": scale}, problem)


EIGHT_BITS = Layout("as in the checkpoint, scales in float32", arrange, restore, reference.part)


def refuse_int8(problem: Problem) -> str | None:
    return _no_gpu(problem) or cpu_int8.not_codes(problem) or cpu_int8.sums_overflow(problem) or _odd_shape(problem, 8)


def refuse_fp8(problem: Problem) -> str | None:
    if reason := _no_gpu(problem):
        return reason
    weights, inputs = problem.weights, problem.activations
    if weights.format.name != "fp8_e4m3" or inputs is None or inputs.format.name != "fp8_e4m3":
        return f"it takes FP8 weights and FP8 activations; these are {weights.format.name} and " + (
            "not quantized" if inputs is None else inputs.format.name
        )
    if weights.granularity.kind not in ("channel", "tensor") or weights.granularity.axis != 0:
        return f"it takes one scale for each output channel; these weights have one per {weights.granularity}"
    if inputs.granularity.kind not in ("token", "tensor"):
        return f"it takes one input scale for each token or one in all; these have one per {inputs.granularity}"
    if (have := torch.cuda.get_device_capability(problem.device)) < FP8_FROM:
        return f"FP8 products need compute capability 8.9 or newer; this GPU has {have[0]}.{have[1]}"
    return _odd_shape(problem, 16)


def _no_gpu(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"it is for NVIDIA GPUs; the layer lies on {problem.device}"
    return None if torch.cuda.is_available() else "torch finds no GPU or no driver"


def _odd_shape(problem: Problem, multiple: int) -> str | None:
    if problem.n % multiple or problem.k % multiple:
        return f"it takes features in multiples of {multiple}; this layer has {problem.k} in and {problem.n} out"
    return None


def int8_by_int8(x: QuantizedTensor, held: Held, problem: Problem) -> Tensor:
    """As on the processor, exact in int32, with rows of zeros up to the fewest that torch takes."""
    rows, codes = len(x.data), held["weight"]
    data = F.pad(x.data, (0, 0, 0, FEWEST_ROWS - rows)) if rows < FEWEST_ROWS else x.data
    sums = torch._int_mm(data, codes.t())[:rows]
    if x.zero_point is None and launch.unavailable(sums.device) is None:  # in one pass
        token = x.scale.to(torch.float32).expand(rows, 1).contiguous()
        return eight_bits.scale_sums(sums, token, held["weight_scale"], x.dtype)
    return cpu_int8.epilogue(sums, x, codes, held["weight_scale"])


def fp8_by_fp8(x: QuantizedTensor, held: Held, problem: Problem) -> Tensor:
    """E4M3 by E4M3 with float32 sums: (M, K) -> (M, N) in x's dtype."""
    rows, weight = len(x.data), held["weight"].t()
    token = x.scale.to(torch.float32).reshape(-1, 1).expand(rows, 1).contiguous()
    channel = held["weight_scale"].to(torch.float32).reshape(1, -1).expand(1, problem.n).contiguous()
    if x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(problem.device) >= ROWWISE_FROM:
        scales = {"scale_a": token, "scale_b": channel}
        return torch._scaled_mm(x.data, weight, **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    one = torch.ones((), device=x.data.device)
    sums = torch._scaled_mm(x.data, weight, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return sums.mul_(token).mul_(channel).to(x.dtype)


INT8 = Kernel(
    "int8 by int8, int32 sums (cuBLAS)", EIGHT_BITS, refuse_int8, int8_by_int8, ANY, "w8a8", "cuda", takes_codes=True
)
FP8 = Kernel(
    "FP8 by FP8, float32 sums (cuBLAS)", EIGHT_BITS, refuse_fp8, fp8_by_fp8, ANY, "fp8", "cuda", takes_codes=True
)
