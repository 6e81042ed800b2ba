"""How sure a figure can be: intervals for shares and means, and a test for two models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from canopyq.errors import CanopyError


@dataclass(frozen=True)
class Share:
    """``right`` of ``n``, with its 95 % Wilson interval (Wilson 1927): honest even at 100 %."""

    right: int
    n: int

    def __post_init__(self) -> None:
        _check(self.right, self.n)

    @property
    def value(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        low, high = self.interval
        return {"right": self.right, "n": self.n, "value": self.value, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.0f}–{100 * high:.0f})"


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share of ``right`` among ``n``."""
    _check(right, n)
    p, z2 = right / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p that ``lost`` and ``gained`` answers differ this much if both changes were equally likely."""
    if min(lost, gained) < 0:
        raise CanopyError(f"{lost} lost and {gained} gained cannot be counts of answers; neither can be negative")
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    return min(1.0, 2 * tail)


def bootstrap(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean, by the percentile bootstrap (Efron 1979): draw as many values again, with repeats,
    and see between which bounds 95 % of the means fall. It assumes no form of distribution. Of two models on the same
    questions give the differences, question by question."""
    if len(values) < 2 or not all(math.isfinite(v) for v in values):
        raise CanopyError(f"{len(values)} values have no interval; give two or more, all of them finite")
    random, n = Random(seed), len(values)
    means = sorted(sum(random.choices(values, k=n)) / n for _ in range(resamples))
    return means[round(0.025 * (resamples - 1))], means[round(0.975 * (resamples - 1))]


def _check(right: int, n: int) -> None:
    if not 0 <= right <= n or n == 0:
        raise CanopyError(f"{right} right of {n} is not a share; n must be positive and right between 0 and n")
