"""One range for all inputs of a layer: every observer beside its definition on the values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from canopyq.calibration.static_range import is_loud, static_range, static_scale
from canopyq.calibration.statistics import ActivationStats, Seen
from canopyq.errors import CanopyError
from canopyq.tensor import affine
from canopyq.tensor.observers import entropy, find_range
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import Scheme

SAMPLES = 12


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    """Samples of different widths, skewed, with rare large values."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 50, 64, generator=draw) * (1 + torch.arange(SAMPLES))[:, None, None] / 6 + 0.5
    return torch.where(torch.rand(x.shape, generator=draw) < 1e-4, x * 20, x)


@pytest.fixture(scope="module")
def seen(values: torch.Tensor) -> ActivationStats:
    found = ActivationStats.empty(64, torch.device("cpu"))
    for batch in values.split(4):
        sample = torch.arange(len(batch)).repeat_interleave(50)
        found.add(Seen(batch, sample, len(batch)))
    return found


def squared_error(x: torch.Tensor, lo: float, hi: float, scheme: Scheme) -> float:
    ends = (torch.tensor([lo]), torch.tensor([hi]))
    scale, zero = affine.scale_and_zero_point(*ends, scheme.format, symmetric=scheme.symmetric)
    return float((affine.fake_quantize(x, scale, zero, scheme.format) - x).double().square().mean())


def test_min_max_is_exact(seen: ActivationStats, values: torch.Tensor) -> None:
    assert static_range(seen, Scheme("int8", symmetric=False)) == (float(values.min()), float(values.max()))
    scale, _ = static_scale(seen, Scheme("int8"))
    assert float(scale) == pytest.approx(float(values.abs().max()) / 127.5)  # symmetric: as far as the farther end


def test_the_moving_average_forgets_slowly(seen: ActivationStats, values: torch.Tensor) -> None:
    lo, hi = float(values[0].min()), float(values[0].max())
    for sample in values[1:]:
        lo, hi = 0.9 * lo + 0.1 * float(sample.min()), 0.9 * hi + 0.1 * float(sample.max())
    assert static_range(seen, Scheme("int8", symmetric=False, observer="average")) == pytest.approx((lo, hi))
    last = static_range(seen, Scheme("int8", observer="average"), momentum=0.0)
    assert last == pytest.approx((float(values[-1].min()), float(values[-1].max())))


@pytest.mark.parametrize("keep", [0.9, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentiles_are_those_of_the_values(
    seen: ActivationStats, values: torch.Tensor, keep: float, symmetric: bool
) -> None:
    lo, hi = static_range(seen, Scheme("int8", symmetric=symmetric, observer="percentile"), keep=keep)
    flat = values.flatten().numpy()
    if symmetric:
        end = np.quantile(np.abs(flat), keep, method="inverted_cdf")
        wanted = (-end, end)
    else:
        tail = (1 - keep) / 2
        wanted = tuple(np.quantile(flat, share, method="inverted_cdf") for share in (tail, 1 - tail))
    bin_width = 2 * seen.histogram.reach / len(seen.histogram.counts)
    assert (lo, hi) == pytest.approx(wanted, abs=bin_width)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_errs_less_than_the_others(seen: ActivationStats, values: torch.Tensor, name: str, symmetric: bool) -> None:
    if name == "fp8" and not symmetric:
        return
    errors = {}
    for observer in ("minmax", "percentile", "mse"):
        scheme = Scheme(name, symmetric=symmetric, observer=observer)
        errors[observer] = squared_error(values, *static_range(seen, scheme), scheme)
    assert errors["mse"] == min(errors.values())
    brute = min(
        squared_error(values, *(end * shrink for end in static_range(seen, Scheme(name, symmetric=symmetric))), scheme)
        for shrink in torch.linspace(1, 0.01, 64).tolist()
    )
    assert errors["mse"] == pytest.approx(brute, rel=2e-2)


def test_entropy_cuts_the_tail_where_the_histogram_of_the_values_does(
    seen: ActivationStats, values: torch.Tensor
) -> None:
    _, hi = static_range(seen, Scheme("int8", observer="entropy"))
    _, direct = entropy(values.reshape(1, -1), Scheme("int8"), smallest=0.01, candidates=64, bins=1024)
    assert 0 < hi < float(values.abs().max()) and hi == pytest.approx(float(direct), rel=0.3)
    with pytest.raises(CanopyError, match="evenly spaced levels"):
        static_range(seen, Scheme("fp8", observer="entropy"))


def test_a_scale_is_rounded_before_it_is_used(seen: ActivationStats) -> None:
    scale, zero = static_scale(seen, Scheme("int8", "tensor", symmetric=False, scale_dtype=torch.bfloat16))
    lo, hi = static_range(seen, Scheme("int8", symmetric=False))
    assert scale.dtype == torch.bfloat16 and scale.shape == zero.shape == (1,) and zero.dtype == torch.int8
    assert float(scale) == pytest.approx((hi - lo) / 255, rel=2**-8)
    assert float(zero) == round(-128 - lo / float(scale))
    assert static_scale(seen, Scheme("fp8"))[1] is None


def test_a_moving_average_is_not_for_tensors() -> None:
    with pytest.raises(CanopyError, match="'average' is for static activations"):
        quantize(torch.randn(4, 4), "int8", observer="average")
    with pytest.raises(CanopyError, match="unknown observer 'averag'"):
        Scheme("int8", observer="averag")


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_counted_values_give_what_the_values_give(observer: str) -> None:
    """A row in which each value stands with its count, and the same row written out."""
    draw = torch.Generator().manual_seed(1)
    distinct = torch.randn(3, 40, generator=draw).sort(dim=1).values
    counts = torch.randint(1, 60, (3, 40), generator=draw)
    scheme = Scheme("int4", symmetric=False, observer=observer)
    for row in range(3):
        whole = distinct[row].repeat_interleave(counts[row])[None]
        counted = {"counts": counts[row : row + 1]}
        ends = find_range(distinct[row : row + 1], scheme, **counted)
        expected = find_range(whole, scheme)
        for end, wanted in zip(ends, expected, strict=True):
            torch.testing.assert_close(end, wanted, rtol=1e-6, atol=0)


# A few massive activations --------------------------------------------------------------------------------------------


@pytest.fixture
def loud(values: torch.Tensor) -> ActivationStats:
    """The same, with one value 100 times as large as the others reach."""
    found, x = ActivationStats.empty(64, torch.device("cpu")), values.clone()
    x[3, 7, 5] = 100 * values.abs().max()
    found.add(Seen(x, torch.arange(len(x)).repeat_interleave(50), len(x)))
    return found


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_percentile_does_not_cut_a_massive_value(loud: ActivationStats, symmetric: bool) -> None:
    scheme = Scheme("int8", symmetric=symmetric, observer="percentile")
    assert static_range(loud, scheme) == static_range(loud, Scheme("int8", symmetric=symmetric, observer="mse"))
    assert static_range(loud, scheme)[1] > float(loud.ranges.max()) / 30
    assert static_range(loud, scheme, keep=0.99)[1] < float(loud.ranges.max()) / 30  # said by the caller


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "average"])
def test_loud_inputs_are_told_apart(loud: ActivationStats, seen: ActivationStats, observer: str) -> None:
    """Whatever the observer; floats need not mind."""
    assert is_loud(loud, Scheme("int8", observer=observer)) and not is_loud(seen, Scheme("int8", observer=observer))
    assert not is_loud(loud, Scheme("fp8", observer=observer))


def test_options_that_count_for_nothing_are_refused(seen: ActivationStats) -> None:
    with pytest.raises(CanopyError, match="keep"):
        static_range(seen, Scheme("int8"), keep=0.99)
