"""8 bits by 8 bits on an NVIDIA GPU for few rows: our own kernel, in the layout that cuBLAS reads too.

How many rows are few, `cuda.selection` knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq.kernels import cpu_int8, cublas
from canopyq.kernels.cuda import eight_bits, launch, selection, warpgroup_codes
from canopyq.kernels.cuda.costs import Product
from canopyq.kernels.cuda.tiles import SkinnyTile
from canopyq.kernels.kernel import Held, Kernel, Problem, Rows, up_to
from canopyq.tensor.quantized_tensor import QuantizedTensor


def refuse_int8(problem: Problem) -> str | None:
    return launch.unavailable(problem.device) or cpu_int8.not_codes(problem) or _odd(problem)


def refuse_fp8(problem: Problem) -> str | None:
    return launch.unavailable(problem.device) or cublas.refuse_fp8(problem) or _odd(problem)


def _odd(problem: Problem) -> str | None:
    if not problem.activations.symmetric:
        return "it takes symmetric activations; these have a zero point"
    if problem.weights.granularity.kind != "channel":
        return f"it takes one scale for each output channel; these weights have one per {problem.weights.granularity}"
    if problem.weights.scale_dtype not in eight_bits.KINDS:
        return f"it takes 16- or 32-bit scales; these are {problem.weights.scale_dtype}"
    if problem.k % 16:
        return f"it takes in_features in multiples of 16; this layer has {problem.k}"
    return cpu_int8.sums_overflow(problem)


def run(x: QuantizedTensor, held: Held, problem: Problem) -> Tensor:
    """(M, K) -> (M, N) in x's dtype."""
    scale = x.scale.to(torch.float32).expand(len(x.data), 1)
    return eight_bits.multiply_codes(x.data, scale, held["weight"], held["weight_scale"], x.dtype)


def rows_int8(problem: Problem) -> Rows:
    return _rows(problem, "w8a8")


def rows_fp8(problem: Problem) -> Rows:
    return _rows(problem, "fp8")


def _rows(problem: Problem, recipe: str) -> Rows:
    """Where it is faster than the kernel for warpgroups, if there is one."""
    if torch.cuda.get_device_capability(problem.device) != warpgroup_codes.HOPPER:
        return up_to(eight_bits.MOST_ROWS)
    return selection.rows_taken(product_of(problem, recipe), SkinnyTile.KERNEL)


def product_of(problem: Problem, recipe: str) -> Product:
    """Of one row, as `selection` takes it."""
    return Product(recipe, problem.n, problem.k, 1, stored_by_copies=problem.n % 8 == 0)


LAYOUT = cublas.EIGHT_BITS
INT8 = Kernel("int8 by int8, few rows (CUDA)", LAYOUT, refuse_int8, run, rows_int8, "w8a8", "cuda", takes_codes=True)
FP8 = Kernel("FP8 by FP8, few rows (CUDA)", LAYOUT, refuse_fp8, run, rows_fp8, "fp8", "cuda", takes_codes=True)
