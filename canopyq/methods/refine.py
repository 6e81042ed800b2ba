"""Making a rounded weight better without more bits: the best scales for its codes, then the best codes in turn.

Both steps lower tr(E H Eᵀ) and neither can raise it. Scales: with the codes fixed the weight is linear in them, so
those of a row solve a small least-squares problem. Codes: with all other columns fixed the best value of column j is
known, and each column in turn goes to the grid point nearest to it: coordinate descent, as in QuantEase (Behdin et al.
2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq.methods.grid import Grid
from canopyq.tensor import QuantizedTensor

BLOCK = 128
FARTHEST = 2.0  # a scale may become this many times larger or smaller: more means that its codes say little of it


def refine(
    weight: Tensor, hessian: Tensor, start: QuantizedTensor, *, damping: float = 0.01, rounds: int = 2
) -> QuantizedTensor:
    """``rounds`` times better scales and better codes for ``weight`` (N, K), beginning with ``start``.

    Args:
        hessian: Σ x xᵀ / tokens of the layer's inputs, (K, K).
        damping: added to its diagonal, as a share of the mean: how little the data is trusted.
    """
    damped = hessian.float() + torch.diag_embed((damping * hessian.diagonal().mean()).expand(len(hessian)))
    current = start
    for _ in range(rounds):
        if Grid(current).has_free_scales:
            rescaled = _rescale(weight.float(), damped, current)
            if output_cost(weight, rescaled, damped) < output_cost(weight, current, damped):
                current = rescaled
        current = _descend(weight.float(), damped, current)
    return current


def output_cost(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ), the mean squared error of a layer's outputs, summed over them."""
    error = weight.float() - quantized.dequantize(torch.float32)
    return float(((error @ hessian) * error).sum())


def _rescale(weight: Tensor, hessian: Tensor, current: QuantizedTensor) -> QuantizedTensor:
    """Least squares: row n is Σ_g s_ng q_ng, so that its scales s_n solve (q H qᵀ) s_n = q H w_n."""
    n, k = weight.shape
    scheme = current.scheme
    unit = current.with_codes(current.codes, torch.ones_like(current.scale)).dequantize(torch.float32)
    size = scheme.granularity.group_size or k
    pad = -k % size
    unit = torch.nn.functional.pad(unit, (0, pad)).reshape(n, -1, size)
    groups = unit.shape[1]
    hessian_by_group = torch.nn.functional.pad(hessian, (0, pad, 0, pad)).reshape(groups, size, groups, size)
    target = torch.nn.functional.pad(weight @ hessian, (0, pad)).reshape(n, groups, size)
    right = (target * unit).sum(-1)
    left = torch.stack([(torch.einsum("ni,ihj->nhj", unit[:, g], hessian_by_group[g]) * unit).sum(-1)
                        for g in range(groups)], dim=1)  # fmt: skip
    if scheme.granularity.kind == "tensor":
        left, right = left.sum(0, keepdim=True), right.sum(0, keepdim=True)
    ridge = left.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-30) * 1e-6
    found = torch.linalg.solve(left + torch.diag_embed(ridge.expand(-1, groups)), right)
    before = current.step().reshape(found.shape)
    sensible = (found > before / FARTHEST) & (found < before * FARTHEST)
    return current.with_codes(current.codes, torch.where(sensible, found, before))


def _descend(weight: Tensor, hessian: Tensor, current: QuantizedTensor) -> QuantizedTensor:
    """One pass of coordinate descent over all columns."""
    n, k = weight.shape
    grid = Grid(current)
    values = current.dequantize(torch.float32).t().contiguous()
    slope = hessian @ (weight.t() - values)  # (K, N): how far each column wants to move, times its curvature
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        moves = values.new_empty(last - first, n)
        for j in range(first, last):
            best = grid.nearest(values[j] + slope[j] / hessian[j, j], j)
            moves[j - first] = best - values[j]
            values[j] = best
            slope[j + 1 : last].addr_(hessian[j, j + 1 : last], moves[j - first], alpha=-1)
        slope[last:].addmm_(hessian[first:last, last:].t(), moves, alpha=-1)
    return grid.encode(values.t())
