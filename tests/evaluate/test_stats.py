"""How sure a count can be: against published values, the equation that defines the interval, and brute force."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopyq.errors import CanopyError
from canopyq.evaluate.stats import Share, bootstrap, mcnemar, wilson

Z = 1.959964
SMALL = [(right, n) for n in (1, 2, 3, 10, 30, 200) for right in {0, 1, n // 2, n - 1, n}]


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 100_000))
    return draw(st.integers(0, n)), n


# Wilson's interval ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_has_the_values_of_newcombe_1998(right: int, n: int, low: float, high: float) -> None:
    """Statistics in Medicine 17, table I, method 3: the score interval without continuity correction."""
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@given(counts())
def test_wilson_ends_are_z_standard_errors_away(count: tuple[int, int]) -> None:
    """The definition: the ends are those shares P for which the count is z standard errors of P away from P."""
    right, n = count
    for end in wilson(right, n):
        assert (right / n - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / n, abs=1e-12)


@given(counts())
def test_wilson_lies_in_zero_to_one_around_the_share(count: tuple[int, int]) -> None:
    right, n = count
    low, high = wilson(right, n)
    assert 0 <= low <= right / n + 1e-12 and right / n - 1e-12 <= high <= 1 and low < high


@pytest.mark.parametrize("n", [1, 7, 60])
def test_wilson_rises_with_the_count(n: int) -> None:
    lows, highs = zip(*(wilson(right, n) for right in range(n + 1)), strict=True)
    assert list(lows) == sorted(set(lows)) and list(highs) == sorted(set(highs))


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_wilson_narrows_with_more_questions(share: float) -> None:
    widths = [high - low for low, high in (wilson(round(share * n), n) for n in (2, 20, 200, 2000))]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(("right", "n"), SMALL)
def test_wilson_of_the_wrong_ones_is_the_mirror_image(right: int, n: int) -> None:
    low, high = wilson(right, n)
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_all_right_is_not_certain() -> None:
    low, high = wilson(20, 20)
    assert high == pytest.approx(1) and low == pytest.approx(20 / (20 + Z**2))


@pytest.mark.parametrize(("right", "n"), [(0, 0), (-1, 5), (6, 5), (1, 0), (0, -1), (-1, -1), (math.nan, 5)])
def test_what_is_no_share_is_refused(right: int, n: int) -> None:
    for make in (wilson, Share):
        with pytest.raises(CanopyError, match=rf"(right={right}|n={n}) is no whole number"):
            make(right, n)


def test_share_reads_as_percent_with_its_interval() -> None:
    share = Share(47, 50)
    assert share.value == 0.94 and share.interval == wilson(47, 50)
    assert str(share) == "94.0 % (84–98)"
    assert share.to_dict() == {"right": 47, "n": 50, "value": 0.94, "low": share.interval[0], "high": share.interval[1]}


# McNemar's exact test -------------------------------------------------------------------------------------------------


def by_brute_force(lost: int, gained: int) -> Fraction:
    """The share of all sequences of fair coins that are at least as uneven as this one."""
    n = lost + gained
    uneven = sum(abs(2 * sum(coins) - n) >= abs(lost - gained) for coins in product((0, 1), repeat=n))
    return Fraction(uneven, 2**n)


@pytest.mark.parametrize("n", range(11))
def test_mcnemar_counts_all_outcomes_as_uneven(n: int) -> None:
    for lost in range(n + 1):
        assert mcnemar(lost, n - lost) == pytest.approx(float(by_brute_force(lost, n - lost)), rel=1e-12)


def test_mcnemar_has_known_values() -> None:
    assert mcnemar(5, 0) == 2 / 2**5  # five lost and none gained: just short of 0.05
    assert mcnemar(6, 0) == 2 / 2**6
    assert mcnemar(10, 2) == pytest.approx(0.03857, abs=5e-6)  # sign test, 2 of 12


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_a_symmetric_probability(lost: int, gained: int) -> None:
    p = mcnemar(lost, gained)
    assert 0 < p <= 1 and p == mcnemar(gained, lost)
    assert mcnemar(max(lost, gained) + 1, min(lost, gained)) <= p


@pytest.mark.parametrize("count", [0, 1, 2, 17, 400])
def test_mcnemar_of_equal_counts_is_one(count: int) -> None:
    assert mcnemar(count, count) == 1.0


def test_mcnemar_stands_large_counts() -> None:
    assert mcnemar(5_000, 0) == 0.0  # smaller than any float
    assert 0.04 < mcnemar(2_600, 2_460) < 0.06


# The bootstrap --------------------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_the_normal_interval_where_that_holds() -> None:
    values = [math.sin(i * 12.9898) for i in range(400)]  # bounded, and many
    mean, spread = statistics.mean(values), statistics.stdev(values) / 20
    assert bootstrap(values) == pytest.approx((mean - 1.96 * spread, mean + 1.96 * spread), abs=0.25 * spread)


def test_bootstrap_holds_the_mean_as_often_as_it_says() -> None:
    random = Random(1)
    hits = 0
    for _ in range(200):
        low, high = bootstrap([random.expovariate(1) for _ in range(60)], resamples=300)
        hits += low <= 1 <= high
    assert 175 <= hits <= 199


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.integers(0, 5))
def test_bootstrap_lies_within_the_values(values: list[float], seed: int) -> None:
    low, high = bootstrap(values, resamples=50, seed=seed)
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert (low, high) == bootstrap(values, resamples=50, seed=seed)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_bootstrap_needs_two_finite_values(values: list[float]) -> None:
    with pytest.raises(CanopyError, match="values"):
        bootstrap(values)
