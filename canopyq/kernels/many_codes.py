"""8 bits by 8 bits on a Hopper GPU for any number of rows: our own kernel, in the layout that cuBLAS reads too.

For INT8 it is the only one that writes scaled results, where cuBLAS writes int32 sums that have to be read again. FP8
goes to cuBLAS where `cuda.selection` finds that faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq.kernels import cublas, skinny
from canopyq.kernels.cuda import selection, warpgroup_codes
from canopyq.kernels.cuda.tiles import CodesTile
from canopyq.kernels.kernel import ANY, Held, Kernel, Problem, Rows
from canopyq.tensor.quantized_tensor import QuantizedTensor


def refuse_int8(problem: Problem) -> str | None:
    return skinny.refuse_int8(problem) or _no_warpgroups(problem)


def refuse_fp8(problem: Problem) -> str | None:
    return skinny.refuse_fp8(problem) or _no_warpgroups(problem)


def _no_warpgroups(problem: Problem) -> str | None:
    if (have := torch.cuda.get_device_capability(problem.device)) != warpgroup_codes.HOPPER:
        return f"it uses products that only compute capability 9.0 has; this GPU has {have[0]}.{have[1]}"
    return None


def run(x: QuantizedTensor, held: Held, problem: Problem) -> Tensor:
    """(M, K) -> (M, N) in x's dtype."""
    scale = x.scale.to(torch.float32).expand(len(x.data), 1)
    return warpgroup_codes.multiply_many_codes(x.data, scale, held["weight"], held["weight_scale"], x.dtype)


def rows_fp8(problem: Problem) -> Rows:
    return selection.rows_taken(skinny.product_of(problem, "fp8"), CodesTile.KERNEL)


LAYOUT = cublas.EIGHT_BITS
INT8 = Kernel("int8 by int8 on warpgroups (CUDA)", LAYOUT, refuse_int8, run, ANY, "w8a8", "cuda", takes_codes=True)
FP8 = Kernel("FP8 by FP8 on warpgroups (CUDA)", LAYOUT, refuse_fp8, run, rows_fp8, "fp8", "cuda", takes_codes=True)
