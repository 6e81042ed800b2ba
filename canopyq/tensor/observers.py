"""Choosing the range of each row from its data.

Every observer takes rows (R, n) that each share a scale, the scheme that they will be quantized by, and returns
``lo, hi``, both (R, 1) in the rows' dtype. The wider the range the coarser the step; the narrower, the more is clipped.
They differ in how they settle that. Symmetric schemes then reach as far as the farther end, on either side.

All take the same arguments, so that any can stand for any other.

With ``counts`` (R, n), of int64, a row holds each value once, in ascending order, and says how often it occurred: a
histogram.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.scheme import OBSERVERS, SAMPLE_OBSERVERS, Scheme
from canopyq.utils import track

Range = tuple[Tensor, Tensor]


def minmax(rows: Tensor, scheme: Scheme, *, counts: Tensor | None = None) -> Range:
    """Everything fits: lo and hi are the smallest and the largest value. Nothing clips; one outlier sets the step."""
    return rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)  # aminmax is several times slower on a CPU


def percentile(
    rows: Tensor,
    scheme: Scheme,
    *,
    counts: Tensor | None = None,
    keep: float = 0.999,
) -> Range:
    """The range that holds the share ``keep`` of the values; the rest, the farthest out, is clipped.

    Symmetric: the ``keep`` quantile of |x|. Asymmetric: half of the rest is cut at either end. Quantiles are by nearest
    rank (numpy's ``inverted_cdf``), so a range end is always a value that occurred.
    """
    if not 0 < keep <= 1:
        raise CanopyError(f"percentile keep={keep} is not a share of the values; use e.g. 0.999")

    def ranked(values: Tensor, share: float) -> Tensor:
        if counts is None:
            n = rows.shape[1]
            rank = min(max(-int(-share * n // 1), 1), n)  # ceil, without float surprises beyond one rank
            return values.kthvalue(rank, dim=1, keepdim=True).values
        values, order = values.sort(dim=1)
        running = counts.gather(1, order).cumsum(1)
        rank = (running[:, -1:].double() * share).ceil().long().clamp(min=1)
        return values.gather(1, torch.searchsorted(running, rank))

    if scheme.symmetric:
        absmax = ranked(rows.abs(), keep)
        return -absmax, absmax
    tail = (1 - keep) / 2
    return ranked(rows, tail), ranked(rows, 1 - tail)


def mse(
    rows: Tensor,
    scheme: Scheme,
    *,
    counts: Tensor | None = None,
    candidates: int = 40,
    smallest: float = 0.3,
) -> Range:
    """The range, shrunk from min-max by a factor between ``smallest`` and 1, whose squared error is least.

    A plain grid search per row, as in OCTAV's motivation (Sakr et al. 2022) and in most weight quantizers:
    ``candidates`` times the work of min-max.
    """
    lo, hi = minmax(rows, scheme)
    scheme = replace(scheme, scale_dtype=None)  # scales are rounded once, when the range is settled
    best_lo, best_hi, best = lo, hi, torch.full_like(lo, float("inf"))
    for shrink in torch.linspace(1.0, smallest, candidates).tolist():
        scale, zero_point = scheme.scale_and_zero_point(lo * shrink, hi * shrink)
        error = (scheme.fake_quantize_rows(rows, scale, zero_point) - rows).square_()
        error = (error if counts is None else error * counts).sum(dim=1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_lo, best_hi = torch.where(better, lo * shrink, best_lo), torch.where(better, hi * shrink, best_hi)
    return best_lo, best_hi


def entropy(
    rows: Tensor,
    scheme: Scheme,
    *,
    counts: Tensor | None = None,
    bins: int = 2048,
    candidates: int = 64,
    smallest: float = 0.1,
) -> Range:
    """The range whose quantized histogram diverges least (KL) from the original one.

    TensorRT's calibration (Migacz 2017, "8-bit Inference with TensorRT"): the values beyond a candidate range are added
    to its end bins, the bins inside are merged into as many levels as the format has, and the two distributions are
    compared. It needs a histogram worth the name: rows of at least 512 values, so not small groups.
    """
    fmt = scheme.format
    if not isinstance(fmt, IntFormat):
        raise CanopyError(f"entropy ranges count evenly spaced levels, which {fmt.name} has not; use observer='mse'")
    values = rows.shape[1] if counts is None else int(counts.sum(1).min())
    if values < 512:
        raise CanopyError(
            f"entropy needs at least 512 values per scale for a histogram, got {values}; "
            "use observer='mse', or a coarser granularity"
        )
    levels = 2**fmt.bits - scheme.restricted
    lo, hi = minmax(rows, scheme)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    absmax = torch.maximum(-lo, hi)
    if scheme.symmetric:
        lo, hi = -absmax, absmax
    # Bins are laid out in units of absmax, where no width over- or underflows.
    unit = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    left, right = lo / unit, hi / unit
    if counts is None:
        width = (right - left).clamp(min=torch.finfo(rows.dtype).tiny)
        index = ((rows / unit - left) / width * bins).long().clamp_(0, bins - 1)
        count = torch.zeros(len(rows), bins, dtype=torch.long, device=rows.device)  # float32 stops counting at 2^24
        count = count.scatter_add_(1, index, torch.ones_like(index)).float()
        centre = left + width * (torch.arange(bins, device=rows.device) + 0.5) / bins
    else:
        count, centre = counts.float(), rows / unit

    best_shrink, best = torch.ones_like(lo), torch.full((len(rows), 1), float("inf"), device=rows.device)
    shrinks = torch.linspace(1.0, smallest, candidates).tolist()
    for shrink in track(shrinks, "entropy ranges"):
        divergence = _clipped_divergence(count, centre, left * shrink, right * shrink, levels)
        better = divergence < best
        best = torch.where(better, divergence, best)
        best_shrink = torch.where(better, shrink, best_shrink)
    return lo * best_shrink, hi * best_shrink


def _clipped_divergence(count: Tensor, centre: Tensor, lo: Tensor, hi: Tensor, levels: int) -> Tensor:
    """KL (R, 1) from each row's histogram, tails folded into the end bins, to its version on ``levels`` levels."""
    inside = (centre >= lo) & (centre <= hi)
    kept = count * inside
    first = inside.float().argmax(dim=1, keepdim=True)
    last = (first + inside.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    reference = kept.scatter_add(1, first, (count * (centre < lo)).sum(dim=1, keepdim=True))
    reference = reference.scatter_add(1, last, (count * (centre > hi)).sum(dim=1, keepdim=True))

    level = ((centre - lo) / (hi - lo) * levels).nan_to_num().long().clamp_(0, levels - 1)
    zeros = torch.zeros(len(count), levels, device=count.device)
    total = zeros.scatter_add(1, level, kept)
    occupied = zeros.scatter_add(1, level, (kept > 0).float())
    merged = torch.where(kept > 0, (total / occupied.clamp(min=1)).gather(1, level), 0.0)

    p = reference / reference.sum(dim=1, keepdim=True)
    q = merged / merged.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.where(p > 0, p * (p.clamp(min=1e-30) / q.clamp(min=1e-9)).log(), 0.0).sum(dim=1, keepdim=True)


_FUNCTIONS = dict(zip(OBSERVERS, (minmax, percentile, mse, entropy), strict=True))


def find_range(rows: Tensor, scheme: Scheme, *, counts: Tensor | None = None, **options: Any) -> Range:
    """The range of each row (R, n) by the scheme's observer.

    Args:
        counts: (R, n), how often each value occurred; None counts every one once.
        options: of the observer, such as ``keep=0.9999``.

    Raises:
        CanopyError: for an observer of samples, and as the observers do.
    """
    if scheme.observer in SAMPLE_OBSERVERS:
        raise CanopyError(
            f"observer {scheme.observer!r} is for static activations, which come in samples; use 'minmax' or 'mse'"
        )
    return _FUNCTIONS[scheme.observer](rows, scheme, counts=counts, **options)
