"""HQQ: scales and zero points that fit the weight with an error that may be sparse. It needs no data.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Instead of Σ |e|² it lowers
Σ |e|^p with p < 1, which forgives a few large errors for many small ones. The half-quadratic trick introduces z, the
part of the error that is forgiven, and takes turns: z by shrinking the error, then scale and zero point by least
squares on w − z.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.observers import minmax
from canopyq.tensor.quantized_tensor import UnpackedTensor, quantize_unpacked
from canopyq.tensor.scheme import Scheme


def hqq(
    weight: Tensor, scheme: Scheme, *, p: float = 0.7, beta: float = 10.0, growth: float = 1.01, steps: int = 20
) -> UnpackedTensor:
    """Codes of a weight by the half-quadratic solver.

    The published solver keeps the scale and moves a zero point of 16 bits. A checkpoint's zero points are integers, and
    symmetric weights have none, so here the scale moves too, and zero points are rounded in every step. A scale that
    forgives too much would clip the largest weights, which count: of all its steps, min-max included, each row keeps
    the one with the least squared error.

    Args:
        weight: (N, K).
        scheme: integers of any granularity.
        p: power of the error; 1 is absolute error.
        beta, growth: how strictly w − z is fitted at first, and the factor by which that grows.
        steps: of the solver.

    Raises:
        CanopyError: for formats other than integers, and as `quantize`.
    """
    if not isinstance(scheme.format, IntFormat):
        raise CanopyError(f"HQQ fits the step of evenly spaced codes, which {scheme.format.name} has not; use gptq")
    nearest = quantize_unpacked(weight, replace(scheme, observer="minmax"))
    scheme = nearest.scheme  # which knows the dtype of its scales
    fmt, granularity, dtype = scheme.format, scheme.granularity, scheme.scale_dtype
    rows = granularity.rows(weight.float())
    lo, hi = minmax(rows, scheme)
    scale, zero = scheme.scale_and_zero_point(lo, hi)
    unit = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)  # the solver's constants are for weights of size 1
    step, middle = scale.float(), torch.zeros_like(lo) if zero is None else zero.float()
    best_step, best_middle, best = step, middle, torch.full_like(lo, torch.inf)
    for _ in range(steps):
        whole = (rows / step).round_()
        levels = whole.clamp_(fmt.qmin + scheme.restricted - middle, fmt.qmax - middle)
        error = torch.addcmul(rows, levels, step, value=-1)
        cost = _dot(error, error)
        better = cost < best
        best, best_step = torch.where(better, cost, best), torch.where(better, step, best_step)
        best_middle = torch.where(better, middle, best_middle)
        fitted = rows - _shrunk(error, unit, beta, p)
        if zero is not None:
            moved = (middle - (fitted / step).sub_(levels).mean(dim=1, keepdim=True)).round_()
            moved = moved.clamp_(fmt.qmin, fmt.qmax)
            levels += middle - moved
            middle = moved
        ratio = _dot(fitted, levels) / _dot(levels, levels)
        step = torch.where(ratio.isfinite() & (ratio > 0), ratio, step).to(dtype).float()
        beta *= growth
    zero = None if zero is None else best_middle.to(torch.int8)
    codes = granularity.from_rows(scheme.quantize_rows(rows, best_step, zero), weight.shape)
    zero = None if zero is None else zero.reshape(nearest.scale.shape)
    return replace(nearest, codes=codes, zero_point=zero).with_scale(best_step)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each row of ``a`` with that of ``b``, both (R, n): (R, 1)."""
    return torch.linalg.vecdot(a, b).unsqueeze(1)


def _shrunk(error: Tensor, unit: Tensor, beta: float, p: float) -> Tensor:
    """For weights of size 1, the minimiser z of |z|^p + β/2 (z − e)², by the generalised soft threshold that the paper
    uses: sign(e) · max(|e| − |e|^(p − 1) / β, 0)."""
    size = error.abs().div_(unit)
    less = size.clamp(min=1e-8).log_().mul_(p - 1).exp_().div_(beta)  # several times faster than pow
    return size.sub_(less).clamp_(min=0).mul_(unit).copysign_(error)
