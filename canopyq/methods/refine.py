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

BLOCK = 64
FARTHEST = 2.0  # a scale may become this many times larger or smaller: more means that its codes say little of it


def refine(
    weight: Tensor, hessian: Tensor, start: QuantizedTensor, *, damping: float = 0.01, rounds: int = 2
) -> QuantizedTensor:
    """``rounds`` times better scales and better codes for ``weight`` (N, K), beginning with ``start``.

    Args:
        hessian: Σ x xᵀ / tokens of the layer's inputs, (K, K).
        damping: added to its diagonal, as a share of the mean: how little the data is trusted.
    """
    weight = weight.float()
    damped = hessian.float() + torch.diag_embed((damping * hessian.diagonal().mean()).expand(len(hessian)))
    target = weight @ damped
    current = start
    for _ in range(rounds):
        slope, cost = _slope(weight, damped, current)
        if Grid(current).has_free_scales:
            rescaled = _rescale(target, damped, current)
            better_slope, better_cost = _slope(weight, damped, rescaled)
            if better_cost < cost:
                current, slope = rescaled, better_slope
        current = _descend(slope, damped, current)
    return current


def _slope(weight: Tensor, hessian: Tensor, quantized: QuantizedTensor) -> tuple[Tensor, float]:
    """E H (N, K): how far each weight wants to move, times its curvature; and tr(E H Eᵀ)."""
    error = weight - quantized.dequantize(torch.float32)
    slope = error @ hessian
    return slope, float(torch.dot(slope.flatten(), error.flatten()))


def _rescale(target: Tensor, hessian: Tensor, current: QuantizedTensor) -> QuantizedTensor:
    """Least squares: row n is Σ_g s_ng q_ng, so that its scales s_n solve (q H qᵀ) s_n = q H w_n. ``target`` is W H."""
    n, k = target.shape
    scheme = current.scheme
    unit = current.with_codes(current.codes, torch.ones_like(current.scale)).dequantize(torch.float32)
    size = scheme.granularity.group_size or k
    pad = -k % size
    unit = torch.nn.functional.pad(unit, (0, pad)).reshape(n, -1, size)
    groups = unit.shape[1]
    hessian_by_group = torch.nn.functional.pad(hessian, (0, pad, 0, pad)).reshape(groups, size, groups, size)
    target = torch.nn.functional.pad(target, (0, pad)).reshape(n, groups, size)
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


def _descend(slope: Tensor, hessian: Tensor, current: QuantizedTensor) -> QuantizedTensor:
    """One pass of coordinate descent over all columns. ``slope``: of `_slope`."""
    n, k = slope.shape
    grid = Grid(current)
    values, slope = current.dequantize(torch.float32).t().contiguous(), slope.t().contiguous()
    pull = hessian.diagonal().reciprocal().tolist()
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        moves = values.new_empty(last - first, n)
        inside = hessian[first:last, first:last].contiguous()
        for i, j in enumerate(range(first, last)):
            value = values[j]
            best = grid.nearest(torch.add(value, slope[j], alpha=pull[j]), j)
            move = torch.sub(best, value, out=moves[i])
            value.copy_(best)
            slope[j + 1 : last].addr_(inside[i, i + 1 :], move, alpha=-1)
        slope[last:].addmm_(hessian[first:last, last:].t(), moves, alpha=-1)
    return grid.encode(values.t())
