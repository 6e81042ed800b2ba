"""GPTQ: round one column after the other, and let the columns still to come make up for each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", section 3. The
error of a layer's outputs is tr(E H Eᵀ) with E = W − Ŵ and H the second moment of its inputs. Rounding column j leaves
an error e_j; the best answer of the columns not rounded yet is to move by −e_j / U_jj · U_j,:, where H⁻¹ = Uᵀ U.
"""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.methods.clip import clip
from canopyq.methods.grid import Grid
from canopyq.methods.refine import refine
from canopyq.scheme import Scheme
from canopyq.tensor import QuantizedTensor, quantize

MOST_DAMPING = 10.0  # as a share of the mean of H's diagonal: above it the inputs' correlations no longer count


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    order: bool = True,
    block: int = 64,
    clipped: bool = True,
    rounds: int = 2,
) -> tuple[QuantizedTensor, list[str]]:
    """Codes of a weight that keep a layer's outputs.

    Scales are settled beforehand, so that columns can be rounded in any order and the file needs no record of it (what
    other tools call static groups). With ``clipped=False, rounds=0`` this is GPTQ as published.

    Args:
        weight: (N, K).
        hessian: Σ x xᵀ / tokens of the layer's inputs, (K, K).
        scheme: of the weight.
        damping: added to H's diagonal, as a share of its mean. A matrix that still has no Cholesky factor gets ten
            times more, up to `MOST_DAMPING`.
        order: columns with the loudest inputs first, while there are many left to make up for them.
        block: columns after which the changes to all later ones are applied at once, as a matrix product.
        clipped: scales by `clip` rather than by min-max.
        rounds: of `refine` afterwards.

    Returns:
        The weight, and what was out of the ordinary: damping that had to be raised, inputs that are always zero.

    Raises:
        CanopyError: for a Hessian that is not finite, of another shape, or cannot be factored, and as `quantize`.
    """
    n, k = weight.shape
    if hessian.shape != (k, k) or not bool(hessian.isfinite().all()):
        raise CanopyError(f"GPTQ needs a finite Hessian ({k}, {k}), got {tuple(hessian.shape)}; look at the inputs")
    start = clip(weight, hessian, scheme) if clipped else quantize(weight, scheme)
    notes = []
    hessian = hessian.float().clone()
    dead = hessian.diagonal() <= 0
    if count := int(dead.sum()):
        notes.append(f"{count} of {k} inputs were zero in all data: those columns are rounded to nearest")
        if count == k:
            return start, notes
        hessian[dead, :] = hessian[:, dead] = 0.0
        hessian.diagonal()[dead] = hessian.diagonal()[~dead].mean()
    columns = torch.argsort(hessian.diagonal(), descending=True) if order else torch.arange(k, device=weight.device)
    inverse, used = _inverse_root(hessian[columns][:, columns], damping)
    if used != damping:
        notes.append(f"the Hessian is singular: damping raised from {damping:g} to {used:g}")

    grid = Grid(start)
    left = weight.float().t()[columns].contiguous()  # column by column, what is still to be rounded
    rounded, diagonal, places = torch.empty_like(left), inverse.diagonal().tolist(), columns.tolist()
    for first in range(0, k, block):
        last = min(first + block, k)
        errors = left.new_empty(last - first, n)
        inside = inverse[first:last, first:last].contiguous()
        for i in range(last - first):
            column = left[first + i]
            value = grid.nearest(column, places[first + i])
            rounded[first + i] = value
            error = torch.sub(column, value, out=errors[i]).div_(diagonal[first + i])
            left[first + i + 1 : last].addr_(inside[i, i + 1 :], error, alpha=-1)
        left[last:].addmm_(inverse[first:last, last:].t(), errors, alpha=-1)
    values = torch.empty_like(rounded)
    values[columns] = rounded
    result = grid.encode(values.t())
    return (refine(weight, hessian, result, damping=used, rounds=rounds) if rounds else result), notes


def _inverse_root(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper U with (H + damping · mean(diagonal) · I)⁻¹ = Uᵀ U, and the damping that it took."""
    mean = hessian.diagonal().mean()
    used = damping
    while True:
        damped = hessian + torch.diag_embed((used * mean).expand(len(hessian)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(upper.isfinite().all()):
            return upper, used
        used = max(used * 10, 1e-4)
        if used > MOST_DAMPING:
            raise CanopyError(f"the Hessian has no Cholesky factor even with damping {used / 10:g}; give more data")
