"""How sure a figure can be: intervals for shares and means, and a test for two models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from canopyq import checks

MOST = 100_000  # answers that can be counted exactly, and samples that can be drawn, in a moment


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
    _check(right, n), checks.number("z", z, 0)
    p, z2 = right / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p that ``lost`` and ``gained`` answers differ this much if both changes were equally likely."""
    n = checks.count("lost", lost, 0, MOST) + checks.count("gained", gained, 0, MOST)
    tail, ways = 0, 1  # of n changes, how many ways to lose k
    for k in range(min(lost, gained) + 1):
        tail, ways = tail + ways, ways * (n - k) // (k + 1)
    return min(1.0, 2 * (tail / 2**n))


def bootstrap(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean, by the percentile bootstrap (Efron 1979): draw as many values again, with repeats,
    and see between which bounds 95 % of the means fall. It assumes no form of distribution. Of two models on the same
    questions give the differences, question by question."""
    values = [checks.number("values", value) for value in checks.sequence("values", values, 2)]
    checks.count("resamples", resamples, 1, MOST), checks.count("seed", seed)
    random, n = Random(seed), len(values)
    means = sorted(sum(random.choices(values, k=n)) / n for _ in range(resamples))
    return means[round(0.025 * (resamples - 1))], means[round(0.975 * (resamples - 1))]


def _check(right: int, n: int) -> None:
    checks.count("right", right, 0, checks.count("n", n, 1))
