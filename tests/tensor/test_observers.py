"""Ranges chosen from data, against numpy and brute force."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.tensor import affine
from canopyq.tensor.observers import entropy, find_range, minmax, mse, percentile
from canopyq.tensor.scheme import OBSERVERS, Scheme

INT4, INT8 = Scheme("int4"), Scheme("int8")
INT8_ASYM = Scheme("int8", symmetric=False)
ROWS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.floats(-(2.0**20), 2.0**20, width=32)
)


def normal(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def squared_error(rows: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme) -> Tensor:
    how = {"restricted": scheme.restricted}
    scale, zero_point = affine.scale_and_zero_point(lo, hi, scheme.format, symmetric=scheme.symmetric, **how)
    restored = affine.fake_quantize(rows, scale, zero_point, scheme.format, **how)
    return (restored - rows).square().sum(dim=1, keepdim=True)


# Min-max --------------------------------------------------------------------------------------------------------------


@given(ROWS)
def test_minmax_reaches_the_ends(values: np.ndarray) -> None:
    rows = torch.from_numpy(values)
    for scheme in (INT8, INT8_ASYM):
        lo, hi = minmax(rows, scheme)
        assert np.array_equal(lo.numpy(), values.min(1, keepdims=True))
        assert np.array_equal(hi.numpy(), values.max(1, keepdims=True))


# Percentile -----------------------------------------------------------------------------------------------------------

KEEPS = [0.999, 0.9999, 0.99, 0.9, 0.1 + 0.2, 0.3, 3 * 0.1, 0.5, 1 / 3, 2 / 3, 0.57, 0.58, 0.29, 1 - 0.9, 1e-9, 1.0]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 128, 999, 1000, 1001, 2000, 10007])
@pytest.mark.parametrize("keep", KEEPS)
def test_percentile_equals_numpy_inverted_cdf(n: int, keep: float) -> None:
    rows = normal(2, n)
    magnitude = np.quantile(rows.abs().numpy(), keep, axis=1, method="inverted_cdf", keepdims=True)
    lo, hi = percentile(rows, INT8, keep=keep)
    assert np.array_equal(hi.numpy(), magnitude) and torch.equal(lo, -hi)
    tail = (1 - keep) / 2
    lo, hi = percentile(rows, INT8_ASYM, keep=keep)
    assert np.array_equal(lo.numpy(), np.quantile(rows.numpy(), tail, axis=1, method="inverted_cdf", keepdims=True))
    assert np.array_equal(hi.numpy(), np.quantile(rows.numpy(), 1 - tail, axis=1, method="inverted_cdf", keepdims=True))


@given(values=ROWS, keep=st.floats(0.001, 1))
def test_percentile_ends_are_values_that_occur(values: np.ndarray, keep: float) -> None:
    rows = torch.from_numpy(values)
    _, hi = percentile(rows, INT8, keep=keep)
    assert (rows.abs() == hi).any(dim=1).all()
    assert ((rows.abs() <= hi).sum(dim=1) >= keep * rows.shape[1] - 1e-6).all()


def test_percentile_leaves_the_one_outlier_out() -> None:
    rows = normal(1, 2000)
    rows[0, 7] = 100.0
    assert percentile(rows, INT8)[1].item() < 5
    assert percentile(rows, INT8_ASYM)[1].item() < 5


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, float("nan")])
def test_percentile_keeps_a_share(keep: float) -> None:
    with pytest.raises(CanopyError, match=f"keep={keep} is not a share"):
        percentile(normal(1, 10), INT8, keep=keep)


# MSE ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@pytest.mark.parametrize("mode", ["symmetric", "restricted", "asymmetric"])
@given(values=ROWS, name=st.sampled_from(["int2", "int4", "int8", "nf4", "fp8", "fp4"]))
def test_mse_is_never_worse_than_minmax(mode: str, values: np.ndarray, name: str) -> None:
    scheme = Scheme(
        name if mode == "symmetric" else "int4", symmetric=mode != "asymmetric", restricted=mode == "restricted"
    )
    rows = torch.from_numpy(values)
    chosen = squared_error(rows, *mse(rows, scheme), scheme)
    plain = squared_error(rows, *minmax(rows, scheme), scheme)
    assert (chosen <= plain).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_mse_equals_a_search_row_by_row(symmetric: bool) -> None:
    rows = normal(6, 100) * torch.logspace(-3, 3, 6).unsqueeze(1)
    scheme = Scheme("int4", symmetric=symmetric)
    lo, hi = mse(rows, scheme, candidates=25, smallest=0.4)
    for i, row in enumerate(rows.unsqueeze(1)):
        full_lo, full_hi = minmax(row, scheme)
        shrinks = torch.linspace(1.0, 0.4, 25).tolist()
        errors = [squared_error(row, full_lo * s, full_hi * s, scheme).item() for s in shrinks]
        best = shrinks[int(np.argmin(errors))]
        assert (lo[i].item(), hi[i].item()) == ((full_lo * best).item(), (full_hi * best).item())


def test_mse_clips_a_normal_row_at_four_bits() -> None:
    rows = normal(4, 4096)
    _, hi = mse(rows, INT4)
    assert (hi < 0.9 * rows.abs().amax(dim=1, keepdim=True)).all()


# Entropy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 3e37], ids=str)
def test_entropy_narrows_when_an_outlier_is_planted(symmetric: bool, scale: float) -> None:
    rows = normal(3, 8192)
    rows[1, 5] = 9.0 * rows.abs().max()
    rows[1, 6] = -rows[1, 5]  # one factor shrinks both ends
    rows *= scale / 9
    lo, hi = entropy(rows, Scheme("int8", symmetric=symmetric))
    absmax = rows.abs().amax(1, keepdim=True)
    assert hi[1] < 0.5 * absmax[1]
    assert (lo >= -absmax).all() and (hi <= absmax).all() and (hi > 0).all()


def test_entropy_keeps_all_of_uniform_data() -> None:
    rows = torch.linspace(-1, 1, 8192).repeat(2, 1)
    _, hi = entropy(rows, INT8)
    assert (hi > 0.97).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_entropy_takes_rows_without_spread(symmetric: bool, dtype: torch.dtype) -> None:
    rows = torch.stack([torch.zeros(600), torch.ones(600), -torch.ones(600), torch.linspace(0, 1, 600)]).to(dtype)
    lo, hi = entropy(rows, Scheme("int8", symmetric=symmetric))
    assert lo.isfinite().all() and hi.isfinite().all() and lo.dtype == hi.dtype == dtype
    assert (lo[0], hi[0]) == (0, 0)
    assert hi[1] > 0 and lo[2] < 0


def test_entropy_refuses_short_rows() -> None:
    with pytest.raises(CanopyError, match="at least 512 values.*got 128.*use observer='mse'"):
        entropy(normal(2, 128), INT8)


@pytest.mark.parametrize("name", ["fp8", "nf4"])
def test_entropy_refuses_uneven_grids(name: str) -> None:
    with pytest.raises(CanopyError, match=f"{name}.* has not; use observer='mse'"):
        entropy(normal(1, 1000), Scheme(name))


# All of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_observer_returns_a_range_per_row(name: str, symmetric: bool, dtype: torch.dtype) -> None:
    rows = normal(5, 600).to(dtype)
    before = rows.clone()
    lo, hi = find_range(rows, Scheme("int4", symmetric=symmetric, observer=name))
    assert lo.shape == hi.shape == (5, 1) and lo.dtype == hi.dtype == dtype
    assert (lo <= hi).all() and torch.equal(rows, before)


@pytest.mark.parametrize("given", ["minmx", "MSE", None, 5, ["mse"]], ids=str)
def test_unknown_observers_list_the_known_ones(given: object) -> None:
    with pytest.raises(CanopyError, match="unknown observer .* known: minmax, percentile, mse, entropy"):
        Scheme("int4", observer=given)  # type: ignore[arg-type]
