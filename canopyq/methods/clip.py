"""Ranges that minimise a layer's output error, and rounding to the nearest value on them.

A narrower range has finer steps and clips what lies beyond. Which range is best depends on how loud the inputs are: an
error on a weight counts as much as the input that it multiplies. This is the clipping of AWQ (Lin et al. 2023, section
3.2 and the code that goes with it), from second moments instead of activations, which gives the same error.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from canopyq.tensor.granularity import Granularity
from canopyq.tensor.observers import minmax
from canopyq.tensor.quantized_tensor import UnpackedTensor, quantize_unpacked
from canopyq.tensor.scheme import Scheme

SHRINK = (1.0, 0.35, 14)  # first, last and number of the factors by which a min-max range is tried


def clip(weight: Tensor, hessian: Tensor, scheme: Scheme) -> UnpackedTensor:
    """Round to nearest on the range of each group whose share of the output error is least.

    For a group with weight error e (1, n) and inputs of second moment H_g (n, n) that share is e H_g eᵀ: what the group
    alone does to the outputs. MXFP4 and NVFP4 derive their scales, so they are rounded as they are.

    Args:
        weight: (N, K).
        hessian: Σ x xᵀ / tokens, (K, K).
        scheme: of the weight.

    Raises:
        CanopyError: as `quantize`.
    """
    nearest = quantize_unpacked(weight, replace(scheme, observer="minmax"))
    scheme = nearest.scheme  # which knows the dtype of its scales
    if scheme.format.scale_dtype is not None:
        return nearest
    granularity = scheme.granularity
    rows = granularity.rows(weight.float())
    blocks = _blocks(hessian, granularity)
    lo, hi = minmax(rows, scheme)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    best = torch.full_like(lo, torch.inf)
    scale, zero_point = torch.ones_like(lo), torch.zeros_like(lo)
    for shrink in torch.linspace(*SHRINK).tolist():
        tried, zero = scheme.scale_and_zero_point(lo * shrink, hi * shrink)
        error = rows - scheme.fake_quantize_rows(rows, tried, zero)
        cost = _cost(error, blocks, granularity, weight.shape)
        better = cost < best
        best = torch.where(better, cost, best)
        scale = torch.where(better, tried.float(), scale)
        if zero is not None:
            zero_point = torch.where(better, zero.float(), zero_point)
    zeros = None if scheme.symmetric else zero_point.to(torch.int8)
    codes = granularity.from_rows(scheme.quantize_rows(rows, scale, zeros), weight.shape)
    zeros = None if zeros is None else zeros.reshape(nearest.scale.shape)
    return replace(nearest, codes=codes, zero_point=zeros).with_scale(scale)


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
