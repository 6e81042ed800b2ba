"""Ranges that minimise a layer's output error, and rounding to the nearest value on them.

A narrower range has finer steps and clips what lies beyond. Which range is best depends on how loud the inputs are: an
error on a weight counts as much as the input that it multiplies. This is the clipping of AWQ (Lin et al. 2023, section
3.2 and the code that goes with it), from second moments instead of activations, which gives the same error.

For blocks of FP4 a wider range can be better too. The values of E2M1 lie 2 apart at the top (4, 6) and ½ apart below 2.
A block whose absmax is laid on 4 instead of 6 loses 5 and 6, and all of its smaller values get finer steps: "four over
six" (Cook et al. 2025). Here every E4M3 code within ¾ of an octave of the usual one is tried, and for MXFP4 the powers
of two below and above.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from canopyq.tensor.formats import BlockFormat
from canopyq.tensor.granularity import Granularity
from canopyq.tensor.observers import minmax
from canopyq.tensor.quantized_tensor import UnpackedTensor, quantize_unpacked
from canopyq.tensor.scheme import Scheme

SHRINK = torch.linspace(1.0, 0.35, 14).tolist()  # the factors by which a min-max range is tried
E4M3_STEPS = [2 ** (step / 16) for step in range(-12, 13)]  # 8 codes an octave, and none of them left out
E8M0_STEPS = [0.5, 1.0, 2.0]


def clip(weight: Tensor, hessian: Tensor, scheme: Scheme, global_scale: Tensor | None = None) -> UnpackedTensor:
    """Round to nearest on the range of each group whose share of the output error is least.

    For a group with weight error e (1, n) and inputs of second moment H_g (n, n) that share is e H_g eᵀ: what the group
    alone does to the outputs.

    Args:
        weight: (N, K).
        hessian: Σ x xᵀ / tokens, (K, K).
        scheme: of the weight.
        global_scale: see `quantize_unpacked`.

    Raises:
        CanopyError: as `quantize`.
    """
    nearest = quantize_unpacked(weight, replace(scheme, observer="minmax"), global_scale)
    scheme, global_scale = nearest.scheme, nearest.global_scale  # the scheme knows the dtype of its scales now
    granularity = scheme.granularity
    rows = granularity.rows(weight.float())
    blocks = _blocks(hessian, granularity)
    lo, hi = minmax(rows, scheme)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    best = torch.full_like(lo, torch.inf)
    scale, zero_point = nearest.scale.reshape(-1, 1).float(), torch.zeros_like(lo, dtype=torch.int8)
    for factor in _factors(scheme):
        tried, zero = scheme.scale_and_zero_point(lo * factor, hi * factor, global_scale)
        codes = scheme.quantize_rows(rows, tried, zero, global_scale)
        error = rows - scheme.dequantize_rows(codes, tried, zero, global_scale)
        cost = _cost(error, blocks, granularity, weight.shape)
        better = cost < best
        best = torch.where(better, cost, best)
        scale = torch.where(better, tried.float(), scale)
        if zero is not None:
            zero_point = torch.where(better, zero, zero_point)
    scale = scale.to(nearest.scale.dtype)
    zeros = None if scheme.symmetric else zero_point
    codes = granularity.from_rows(scheme.quantize_rows(rows, scale, zeros, global_scale), weight.shape)
    zeros = None if zeros is None else zeros.reshape(nearest.scale.shape)
    return replace(nearest, codes=codes, zero_point=zeros, scale=scale.reshape(nearest.scale.shape))


def _factors(scheme: Scheme) -> list[float]:
    """By which the min-max range of a group is made narrower or wider."""
    if not isinstance(scheme.format, BlockFormat):
        return SHRINK
    return E4M3_STEPS if scheme.format.has_global_scale else E8M0_STEPS


def _blocks(hessian: Tensor, granularity: Granularity) -> Tensor:
    """The second moments of the inputs that share a scale: (G, n, n)."""
    if granularity.kind != "group":
        return hessian[None]
    size = granularity.group_size
    if pad := -len(hessian) % size:
        hessian = torch.nn.functional.pad(hessian, (0, pad, 0, pad))
    groups = len(hessian) // size
    return hessian.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _cost(error: Tensor, blocks: Tensor, granularity: Granularity, shape: torch.Size) -> Tensor:
    """e H_g eᵀ of each row of `Granularity.rows`, (rows, 1)."""
    by_group = error.reshape(shape[0], len(blocks), -1).transpose(0, 1)  # (G, N, n)
    cost = (by_group @ blocks).mul_(by_group).sum(-1)
    return cost.sum().reshape(1, 1) if granularity.kind == "tensor" else cost.t().reshape(-1, 1)
