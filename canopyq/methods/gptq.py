"""GPTQ: round one column after the other, and let the columns still to come make up for each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", section 3. The
error of a layer's outputs is tr(E H Eᵀ) with E = W − Ŵ and H the second moment of its inputs. Rounding column j leaves
an error e_j; the best answer of the columns not rounded yet is to move by −e_j / U_jj · U_j,:, where H⁻¹ = Uᵀ U.

`refine` goes on where GPTQ ends, without more bits: the best scales for the codes, then the best codes in turn. Both
steps lower tr(E H Eᵀ) and neither can raise it. Scales: with the codes fixed the weight is linear in them, so those of
a row solve a small least-squares problem. Codes: with all other columns fixed the best value of column j is known, and
each column in turn goes to the grid point nearest to it: coordinate descent, as in QuantEase (Behdin et al. 2023).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.methods.clip import clip
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.granularity import Granularity
from canopyq.tensor.quantized_tensor import UnpackedTensor, quantize_unpacked
from canopyq.tensor.scheme import Scheme

MAX_DAMPING = 10.0  # as a share of the mean of H's diagonal: above it the inputs' correlations no longer count
BLOCK = 64  # columns after which the changes to all later ones are applied at once, as a matrix product
MAX_RESCALE = 2.0  # a scale may become so many times larger or smaller: more means that its codes say little of it


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    global_scale: Tensor | None = None,
    damp_percent: float = 0.01,
    desc_act: bool = True,
    block: int = BLOCK,
    clipped: bool = True,
    rounds: int = 2,
) -> tuple[UnpackedTensor, list[str]]:
    """Codes of a weight that keep a layer's outputs.

    Scales are settled beforehand, so that columns can be rounded in any order and the file needs no record of it (what
    other tools call ``static_groups``). With ``clipped=False, rounds=0`` this is GPTQ as published.

    Args:
        weight: (N, K).
        hessian: Σ x xᵀ / tokens of the layer's inputs, (K, K).
        scheme: of the weight.
        global_scale: see `quantize_unpacked`.
        damp_percent: added to H's diagonal, as a share of its mean (0.01 is 1 %). A matrix that still has no Cholesky
            factor gets ten times more, up to `MAX_DAMPING`.
        desc_act: columns with the loudest inputs first (act order), while there are many left to make up for them.
        block: columns after which the changes to all later ones are applied.
        clipped: scales by `clip` rather than by min-max.
        rounds: of `refine` afterwards.

    Returns:
        The codes, and what was out of the ordinary: damping that had to be raised, inputs that are always zero.

    Raises:
        CanopyError: for a Hessian that is not finite, of another shape, or cannot be factored, and as `quantize`.
    """
    n, k = weight.shape
    if hessian.shape != (k, k) or not bool(hessian.isfinite().all()):
        raise CanopyError(f"GPTQ needs a finite Hessian ({k}, {k}), got {tuple(hessian.shape)}; look at the inputs")
    start = clip(weight, hessian, scheme, global_scale) if clipped else quantize_unpacked(weight, scheme, global_scale)
    notes = []
    hessian = hessian.float().clone()
    dead = hessian.diagonal() <= 0
    if count := int(dead.sum()):
        notes.append(f"{count} of {k} inputs were zero in all data: those columns are rounded to nearest")
        if count == k:
            return start, notes
        hessian[dead, :] = hessian[:, dead] = 0.0
        hessian.diagonal()[dead] = hessian.diagonal()[~dead].mean()
    columns = torch.argsort(hessian.diagonal(), descending=True) if desc_act else torch.arange(k, device=weight.device)
    inverse, used = _inverse_root(hessian[columns][:, columns], damp_percent)
    if used != damp_percent:
        notes.append(f"the Hessian is singular: damping raised from {damp_percent:g} to {used:g}")

    grid = _Grid(start)
    left = weight.float().t()[columns].contiguous()  # column by column, what is still to be rounded
    levels, diagonal, places = torch.empty_like(left), inverse.diagonal().tolist(), columns.tolist()
    for first in range(0, k, block):
        last = min(first + block, k)
        errors = left.new_empty(last - first, n)
        inside = inverse[first:last, first:last].contiguous()
        for i in range(last - first):
            column, place = left[first + i], places[first + i]
            value = grid.nearest(column, place, out=levels[place])
            error = torch.sub(column, value, out=errors[i]).div_(diagonal[first + i])
            left[first + i + 1 : last].addr_(inside[i, i + 1 :], error, alpha=-1)
        left[last:].addmm_(inverse[first:last, last:].t(), errors, alpha=-1)
    result = grid.encode(levels)
    return (refine(weight, hessian, result, damp_percent=used, rounds=rounds) if rounds else result), notes


def _inverse_root(hessian: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """Upper U with (H + damp_percent · mean(diagonal) · I)⁻¹ = Uᵀ U, and the damping that it took."""
    mean = hessian.diagonal().mean()
    used = damp_percent
    while True:
        damped = hessian + torch.diag_embed((used * mean).expand(len(hessian)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(upper.isfinite().all()):
            return upper, used
        used = max(used * 10, 1e-4)
        if used > MAX_DAMPING:
            raise CanopyError(f"the Hessian has no Cholesky factor even with damping {used / 10:g}; give more data")


class _Grid:
    """The values that the weights of a matrix (N, K) can take once their scales are settled: level · scale, where a
    level is a value of the format, and for integers code − zero point.

    Args:
        start: any codes of the matrix; only their scales and zero points count.
    """

    def __init__(self, start: UnpackedTensor) -> None:
        self.start, self.format = start, start.scheme.format
        n, k = start.codes.shape
        scale = _by_column(start.float_scale(), start.scheme.granularity, n, k)
        self._scales = scale.unbind(0)  # a view for each column: the loops over columns live on small change
        self._zero_point = None
        if start.zero_point is not None:
            self._zero_point = _by_column(start.zero_point.float(), start.scheme.granularity, n, k)
        if isinstance(self.format, IntFormat):
            ends = (self.format.qmin + start.scheme.restricted, self.format.qmax)
            self._ends = [ends] * k
            if self._zero_point is not None:
                self._ends = [(ends[0] - zero, ends[1] - zero) for zero in self._zero_point.unbind(0)]

    def nearest(self, values: Tensor, column: int, out: Tensor) -> Tensor:
        """The grid point nearest to each of ``values`` (N,) in a column; its level goes to ``out`` (N,)."""
        scale = self._scales[column]
        if isinstance(self.format, IntFormat):
            torch.div(values, scale, out=out).round_().clamp_(*self._ends[column])
        else:
            out.copy_(self.format.round(values / scale))
        return out * scale

    def encode(self, levels: Tensor) -> UnpackedTensor:
        """The codes of levels (K, N)."""
        if isinstance(self.format, IntFormat):
            codes = (levels if self._zero_point is None else levels + self._zero_point).to(torch.int8)
        else:
            codes = self.format.encode(levels)
        return replace(self.start, codes=codes.t().contiguous())


def _by_column(stored: Tensor, granularity: Granularity, n: int, k: int) -> Tensor:
    """One number for each weight, (K, N): contiguous by column."""
    if granularity.kind == "tensor":
        return stored.reshape(1, 1).expand(k, n)
    if granularity.kind != "group":
        return stored.reshape(1, n).expand(k, n)
    return stored.t().repeat_interleave(granularity.group_size, dim=0)[:k].contiguous()


def refine(
    weight: Tensor, hessian: Tensor, start: UnpackedTensor, *, damp_percent: float = 0.01, rounds: int = 2
) -> UnpackedTensor:
    """``rounds`` times better scales and better codes for ``weight`` (N, K), beginning with ``start``.

    Args:
        hessian: Σ x xᵀ / tokens of the layer's inputs, (K, K).
        damp_percent: added to its diagonal, as a share of the mean: how little the data is trusted.
    """
    weight = weight.float()
    damped = hessian.float() + torch.diag_embed((damp_percent * hessian.diagonal().mean()).expand(len(hessian)))
    target = weight @ damped
    current = start
    for _ in range(rounds):
        slope, cost = _slope(weight, damped, current)
        if current.scheme.format.scale_dtype is None:  # any number may be a scale
            rescaled = _rescale(target, damped, current)
            better_slope, better_cost = _slope(weight, damped, rescaled)
            if better_cost < cost:
                current, slope = rescaled, better_slope
        current = _descend(slope, damped, current)
    return current


def _slope(weight: Tensor, hessian: Tensor, quantized: UnpackedTensor) -> tuple[Tensor, float]:
    """E H (N, K): how far each weight wants to move, times its curvature; and tr(E H Eᵀ)."""
    error = weight - quantized.dequantize(torch.float32)
    slope = error @ hessian
    return slope, float(torch.dot(slope.flatten(), error.flatten()))


def _rescale(target: Tensor, hessian: Tensor, current: UnpackedTensor) -> UnpackedTensor:
    """Least squares: row n is Σ_g s_ng q_ng, so that its scales s_n solve (q H qᵀ) s_n = q H w_n. ``target`` is W H."""
    n, k = target.shape
    scheme = current.scheme
    levels = current.with_scale(torch.ones_like(current.scale)).dequantize(torch.float32)
    size = scheme.granularity.group_size or k
    pad = -k % size
    levels = torch.nn.functional.pad(levels, (0, pad)).reshape(n, -1, size)
    groups = levels.shape[1]
    hessian_by_group = torch.nn.functional.pad(hessian, (0, pad, 0, pad)).reshape(groups, size, groups, size)
    target = torch.nn.functional.pad(target, (0, pad)).reshape(n, groups, size)
    right = (target * levels).sum(-1)
    left = torch.stack([(torch.einsum("ni,ihj->nhj", levels[:, g], hessian_by_group[g]) * levels).sum(-1)
                        for g in range(groups)], dim=1)  # fmt: skip
    if scheme.granularity.kind == "tensor":
        left, right = left.sum(0, keepdim=True), right.sum(0, keepdim=True)
    ridge = left.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-30) * 1e-6
    best = torch.linalg.solve(left + torch.diag_embed(ridge.expand(-1, groups)), right)
    before = current.float_scale().reshape(best.shape)
    sensible = (best > before / MAX_RESCALE) & (best < before * MAX_RESCALE)
    return current.with_scale(torch.where(sensible, best, before))


def _descend(slope: Tensor, hessian: Tensor, current: UnpackedTensor) -> UnpackedTensor:
    """One pass of coordinate descent over all columns. ``slope``: of `_slope`."""
    n, k = slope.shape
    grid = _Grid(current)
    values, slope = current.dequantize(torch.float32).t().contiguous(), slope.t().contiguous()
    levels = torch.empty_like(values)
    pull = hessian.diagonal().reciprocal().tolist()
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        moves = values.new_empty(last - first, n)
        inside = hessian[first:last, first:last].contiguous()
        for i, j in enumerate(range(first, last)):
            value = values[j]
            best = grid.nearest(torch.add(value, slope[j], alpha=pull[j]), j, out=levels[j])
            move = torch.sub(best, value, out=moves[i])
            value.copy_(best)
            slope[j + 1 : last].addr_(inside[i, i + 1 :], move, alpha=-1)
        slope[last:].addmm_(hessian[first:last, last:].t(), moves, alpha=-1)
    return grid.encode(levels)
