"""What calibration remembers of a linear layer's inputs: ranges, counts, sums, and a few of the inputs if asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from canopyq.calibration.histogram import Histogram
from canopyq.errors import CanopyError


@dataclass
class ActivationStats:
    """The inputs x (…, K) of one layer, over all real tokens of the calibration data.

    Attributes:
        tokens: how many there were.
        lo, hi: smallest and largest value of each input feature, float32 (K,).
        mean_abs: mean |x| of each input feature, float32 (K,).
        ranges: smallest and largest value of each sample, in the order of the data, float32 (samples, 2).
        histogram: counts of all values; none unless asked for.
        examples: some of the inputs themselves, spread evenly over the data, float32 (rows, K); none unless asked for.
        hessian: Σ x xᵀ / tokens, float32 (K, K), or None. Half the second derivative of the mean squared output error
            with respect to one row of the weight (Frantar et al. 2022, "GPTQ", section 3). Tokens may have been
            capped (see `calibration.calibrate`).
    """

    tokens: int
    lo: Tensor
    hi: Tensor
    mean_abs: Tensor
    ranges: Tensor
    histogram: Histogram = field(repr=False)
    examples: Tensor = field(repr=False)
    hessian: Tensor | None = field(default=None, repr=False)

    @classmethod
    def empty(cls, features: int, device: torch.device, *, hessian: bool = False) -> ActivationStats:
        """Statistics before the first token, of inputs of ``features`` values."""
        infinite = torch.full((features,), torch.inf, device=device)
        zeros = torch.zeros(features, device=device)
        square = torch.zeros(features, features, device=device) if hessian else None
        none = torch.empty(0, features, device=device)
        return cls(0, infinite, -infinite, zeros, torch.empty(0, 2), Histogram(device), none, square)

    def add(
        self, seen: Seen, *, histogram: bool = True, examples: int = 0, token_norm_cap: float | None = None
    ) -> None:
        """Take the inputs of one more batch into account, and keep up to ``examples`` of them. ``token_norm_cap``:
        see `Seen.second_moment`."""
        if not seen.tokens:
            return
        share = seen.tokens / (self.tokens + seen.tokens)
        self.lo, self.hi = torch.minimum(self.lo, seen.lo), torch.maximum(self.hi, seen.hi)
        self.mean_abs = self.mean_abs.lerp(seen.mean_abs, share)
        if self.hessian is not None:
            self.hessian.lerp_(seen.second_moment(token_norm_cap), share)
        self.ranges = torch.cat([self.ranges, seen.ranges])
        if examples:
            picked = torch.linspace(0, seen.tokens - 1, min(examples, seen.tokens)).long()
            self.examples = torch.cat([self.examples, seen.rows[picked.to(seen.rows.device)]])
        if histogram:
            self.histogram.merge(seen.histogram())
        self.tokens += seen.tokens

    def divided(self, scales: Tensor) -> ActivationStats:
        """The same for inputs that are divided by ``scales`` (K,) first, but for the ranges and the histogram, which
        do not tell features apart and are left empty."""
        hessian = None if self.hessian is None else self.hessian / (scales[:, None] * scales)
        lo, hi, mean_abs = (x / scales for x in (self.lo, self.hi, self.mean_abs))
        empty = Histogram(self.lo.device)
        return ActivationStats(self.tokens, lo, hi, mean_abs, torch.empty(0, 2), empty, self.examples / scales, hessian)

    def running(self) -> Tensor:
        """The range of the first 1, 2, 3 … samples together, (samples, 2)."""
        return torch.stack([self.ranges[:, 0].cummin(0).values, self.ranges[:, 1].cummax(0).values], dim=1)

    def growth(self) -> float:
        """By how much the second half of the samples widened the range that the first half had, as a share."""
        running = self.running()
        if len(running) < 2:
            return float("inf")
        half, whole = (float(end[1] - end[0]) for end in (running[(len(running) - 1) // 2], running[-1]))
        return whole / half - 1 if half else 0.0 if not whole else float("inf")


def pooled(stats: list[ActivationStats]) -> ActivationStats:
    """The statistics of several layers' inputs together, without ranges and histogram: of experts, whose inputs are
    parts of one stream. Layers that saw the same count once."""
    whole = stats[0]
    for other in stats[1:]:
        if other.tokens == stats[0].tokens and torch.equal(other.mean_abs, stats[0].mean_abs):
            continue
        share = other.tokens / (whole.tokens + other.tokens)
        whole = ActivationStats(
            whole.tokens + other.tokens, torch.minimum(whole.lo, other.lo), torch.maximum(whole.hi, other.hi),
            whole.mean_abs.lerp(other.mean_abs, share), torch.empty(0, 2), Histogram(whole.lo.device),
            torch.cat([whole.examples, other.examples]),
            None if whole.hessian is None else whole.hessian.lerp(other.hessian, share),
        )  # fmt: skip
    return whole


class Seen:
    """The inputs of one batch, reduced. Layers that share an input share this too.

    Args:
        x: (…, K), as the layer gets it.
        sample: for each row of x, the number of the sample that it comes from; −1 for padding, which is left out.
        samples: in the batch.

    Raises:
        CanopyError: for NaN or infinite inputs.
    """

    def __init__(self, x: Tensor, sample: Tensor, samples: int) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if bool((sample < 0).any()):
            rows, sample = rows[sample >= 0], sample[sample >= 0]
        self.rows, self.tokens = rows, len(rows)
        if not self.tokens:
            return
        self.lo, self.hi = rows.amin(dim=0), rows.amax(dim=0)  # aminmax is several times slower
        if not bool((self.lo.isfinite() & self.hi.isfinite()).all()):
            nans = int(rows.isnan().sum())
            infinite = int(rows.isinf().sum())
            raise CanopyError(
                f"its inputs hold {nans} NaN and {infinite} infinite values on the calibration data; look "
                "for the layer before it that makes them, or use float32"
            )
        self.mean_abs = rows.abs().mean(dim=0)
        least, most = rows.amin(dim=1), rows.amax(dim=1)
        infinite = torch.full((samples,), torch.inf, device=rows.device)
        low = infinite.scatter_reduce(0, sample, least, "amin")
        high = (-infinite).scatter_reduce(0, sample, most, "amax")
        self.ranges = torch.stack([low, high], dim=1)[low <= high].cpu()
        self._histogram: Histogram | None = None
        self._second_moment: Tensor | None = None

    def histogram(self) -> Histogram:
        """Counts of all values."""
        if self._histogram is None:
            self._histogram = Histogram(self.rows.device)
            self._histogram.add(self.rows)
        return self._histogram

    def second_moment(self, token_norm_cap: float | None) -> Tensor:
        """Mean of x xᵀ, (K, K). A token longer than ``token_norm_cap`` times the batch's median counts as if it were so
        long."""
        if self._second_moment is None:
            rows = self.rows
            if token_norm_cap is not None:
                length = rows.norm(dim=1, keepdim=True)
                rows = rows * (token_norm_cap * length.median() / length.clamp(min=1e-30)).clamp(max=1)
            self._second_moment = rows.t() @ rows / self.tokens
        return self._second_moment
