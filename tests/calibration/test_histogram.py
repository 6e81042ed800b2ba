"""Histograms of bounded memory: exact counts, whatever the order and size of what comes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopyq.calibration.histogram import BINS, Histogram


def filled(parts: list[torch.Tensor]) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(-30, 30)), min_size=1, max_size=6), st.randoms())
def test_batches_and_their_order_do_not_matter(parts: list[tuple[int, float]], rng) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(n) * 2.0**exponent for n, exponent in parts]
    one, whole = filled(tensors), filled([torch.cat(tensors)])
    rng.shuffle(tensors)
    other = filled(tensors)
    assert one.reach == other.reach == whole.reach
    assert torch.equal(one.counts, other.counts) and torch.equal(one.counts, whole.counts)
    merged = Histogram()
    for tensor in tensors:
        merged.merge(filled([tensor]))
    merged.merge(Histogram())
    assert merged.reach == whole.reach and torch.equal(merged.counts, whole.counts)
    assert int(one.counts.sum()) == sum(map(len, tensors))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 3e4, 1e30])
def test_every_value_is_within_half_a_bin(scale: float) -> None:
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)) * scale
    histogram = filled([x[:1], x[1:]])
    middle = histogram.values().repeat_interleave(histogram.counts)
    off = (middle - x.flatten().sort().values).abs().max()
    assert float(off) <= 0.51 * histogram.reach * 2 / BINS
    assert float(off) <= float(x.abs().max()) / 8000


def test_nothing_and_zeros() -> None:
    histogram = filled([torch.empty(0), torch.zeros(7), torch.full((3,), 4.0)])
    assert int(histogram.counts.sum()) == 10 and histogram.reach == 8.0
    assert histogram.values()[histogram.counts == 7].abs().item() < 8 / BINS * 2


def test_against_numpy_on_the_final_reach() -> None:
    import numpy as np

    x = torch.randn(100_000, generator=torch.Generator().manual_seed(2)).exp()
    histogram = filled([x])
    expected, _ = np.histogram(x.numpy(), bins=BINS, range=(-histogram.reach, histogram.reach))
    assert np.array_equal(expected, histogram.counts.numpy())
