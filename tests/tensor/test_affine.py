"""Scale and zero point against torch's own quantizers, and the error bound that the theory promises."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.tensor import affine
from canopyq.tensor.formats import get_format

BITS = range(2, 9)
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def sample(seed: int = 0, shape: tuple[int, ...] = (16, 64)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)


def away_from_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Where x / scale is not within 1e-4 of a half: torch multiplies by 1 / scale, which may tip a tie."""
    ratio = (x.double() / scale.double()).frac().abs()
    return (ratio - 0.5).abs() > 1e-4


# Against torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_equals_torch_fake_quantize_per_tensor(bits: int, symmetric: bool) -> None:
    fmt, x = get_format(f"int{bits}"), sample().flatten()
    scale, zero_point = affine.scale_and_zero_point(x.min(), x.max(), fmt, symmetric=symmetric)
    zero = 0 if zero_point is None else int(zero_point)
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), zero, fmt.qmin, fmt.qmax)
    sure = away_from_ties(x, scale)
    assert sure.float().mean() > 0.98  # a row's absmax always ties: x / scale is half of 2^bits − 1
    torch.testing.assert_close(affine.fake_quantize(x, scale, zero_point, fmt)[sure], expected[sure], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_equals_torch_fake_quantize_per_channel(bits: int, symmetric: bool) -> None:
    fmt, x = get_format(f"int{bits}"), sample()
    scale, zero_point = affine.scale_and_zero_point(*ends(x), fmt, symmetric=symmetric)
    zero = torch.zeros(len(x), dtype=torch.int32) if zero_point is None else zero_point.flatten().int()
    expected = torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero, 0, fmt.qmin, fmt.qmax)
    sure = away_from_ties(x, scale)
    assert sure.float().mean() > 0.98  # a row's absmax always ties: x / scale is half of 2^bits − 1
    torch.testing.assert_close(affine.fake_quantize(x, scale, zero_point, fmt)[sure], expected[sure], rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_codes_equal_torch_quantized_tensors(symmetric: bool) -> None:
    x = sample()
    scale, zero_point = affine.scale_and_zero_point(*ends(x), "int8", symmetric=symmetric)
    zero = torch.zeros(len(x), dtype=torch.long) if zero_point is None else zero_point.flatten().long()
    per_channel = torch.quantize_per_channel(x, scale.flatten().double(), zero, 0, torch.qint8)
    sure = away_from_ties(x, scale)
    assert torch.equal(affine.quantize(x, scale, zero_point, "int8")[sure], per_channel.int_repr()[sure])

    scale, zero_point = affine.scale_and_zero_point(x.min(), x.max(), "int8", symmetric=symmetric)
    per_tensor = torch.quantize_per_tensor(x, float(scale), 0 if zero_point is None else int(zero_point), torch.qint8)
    sure = away_from_ties(x, scale)
    assert torch.equal(affine.quantize(x, scale, zero_point, "int8")[sure], per_tensor.int_repr()[sure])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_scales_equal_torch_observers(symmetric: bool) -> None:
    from torch.ao.quantization.observer import MinMaxObserver

    x = sample()
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    observer = MinMaxObserver(dtype=torch.qint8, qscheme=scheme, quant_min=-128, quant_max=127)
    observer(x)
    expected_scale, expected_zero = observer.calculate_qparams()
    scale, zero_point = affine.scale_and_zero_point(x.min(), x.max(), "int8", symmetric=symmetric)
    torch.testing.assert_close(scale.reshape(1), expected_scale, rtol=1e-6, atol=0)
    assert int(expected_zero) == (0 if zero_point is None else int(zero_point))


# What the theory promises ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["symmetric", "restricted", "asymmetric"])
@given(
    rows=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=FINITE),
    bits=st.sampled_from(BITS),
)
def test_error_is_at_most_half_a_step_inside_the_range(mode: str, rows: np.ndarray, bits: int) -> None:
    fmt, x = get_format(f"int{bits}"), torch.from_numpy(rows)
    symmetric, restricted = mode != "asymmetric", mode == "restricted"
    scale, zero_point = affine.scale_and_zero_point(*ends(x), fmt, symmetric=symmetric, restricted=restricted)
    codes = affine.quantize(x, scale, zero_point, fmt, restricted=restricted)
    assert codes.dtype == torch.int8
    assert codes.min() >= fmt.qmin + restricted and codes.max() <= fmt.qmax
    error = (affine.dequantize(codes, scale, zero_point, fmt, torch.float64) - x.double()).abs()
    assert (error <= 0.5 * scale.double() * (1 + 1e-4)).all()


@given(rows=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=FINITE))
def test_zero_is_exact_and_the_zero_point_is_a_code(rows: np.ndarray) -> None:
    x = torch.from_numpy(rows)
    for bits in BITS:
        fmt = get_format(f"int{bits}")
        scale, zero_point = affine.scale_and_zero_point(*ends(x), fmt, symmetric=False)
        assert zero_point.dtype == torch.int8
        assert zero_point.min() >= fmt.qmin and zero_point.max() <= fmt.qmax
        assert (affine.fake_quantize(torch.zeros_like(x), scale, zero_point, fmt) == 0).all()
        assert (scale > 0).all()


@pytest.mark.parametrize(
    ("lo", "hi", "zero_point"),
    [(0.0, 15.0, -8), (3.0, 15.0, -8), (-15.0, 0.0, 7), (-15.0, -2.0, 7), (-5.0, 10.0, -3), (0.0, 0.0, -8)],
    ids=["from zero", "all positive", "to zero", "all negative", "both", "all zero"],
)
def test_zero_points_by_hand(lo: float, hi: float, zero_point: int) -> None:
    scale, zero = affine.scale_and_zero_point(torch.tensor(lo), torch.tensor(hi), "int4", symmetric=False)
    assert (scale.item(), zero.item()) == (1.0, zero_point)


@pytest.mark.parametrize(
    ("name", "restricted", "divisor"),
    [("int8", False, 127.5), ("int8", True, 127), ("int4", False, 7.5), ("int4", True, 7), ("int2", False, 1.5),
     ("int2", True, 1), ("fp8", False, 448), ("fp8_e5m2", False, 57344), ("fp4", False, 6), ("nf4", False, 1)],
)  # fmt: skip
def test_symmetric_scale_divides_absmax(name: str, restricted: bool, divisor: float) -> None:
    lo, hi = torch.tensor([[-3.0]]), torch.tensor([[2.0]])
    scale, zero_point = affine.scale_and_zero_point(lo, hi, name, restricted=restricted)
    assert zero_point is None
    torch.testing.assert_close(scale, torch.tensor([[3.0 / divisor]]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2", "fp4", "nf4"])
def test_float_grids_reach_their_largest_value_and_keep_zero(name: str) -> None:
    x = torch.tensor([[-4.0, 0.0, 1.0, 4.0]])
    scale, _ = affine.scale_and_zero_point(*ends(x), name)
    restored = affine.fake_quantize(x, scale, None, name)
    assert restored[0, [0, 1, 3]].tolist() == [-4.0, 0.0, 4.0]


# Scales as they are stored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scale_is_rounded_to_its_dtype_before_use(dtype: torch.dtype) -> None:
    lo, hi = torch.tensor([[-1.0]]), torch.tensor([[1.1]])
    scale, _ = affine.scale_and_zero_point(lo, hi, "int4", scale_dtype=dtype)
    assert scale.dtype == dtype
    assert scale.item() == (hi / 7.5).to(dtype).item()


@given(absmax=st.floats(2.0**-20, 2.0**10, width=32), name=st.sampled_from(["int4", "int8", "fp8"]))
def test_small_float16_scales_lose_no_more_than_a_step(absmax: float, name: str) -> None:
    # float16 is coarse under 6e-5, and an INT8 row of absmax 0.005 already has a scale below that.
    x = torch.linspace(-absmax, absmax, 33).unsqueeze(0)
    exact, _ = affine.scale_and_zero_point(*ends(x), name)
    scale, _ = affine.scale_and_zero_point(*ends(x), name, scale_dtype=torch.float16)
    assert (scale.float() - exact).abs().item() <= max(2.0**-24, exact.item() * 2.0**-11)
    if name != "fp8":
        error = (affine.fake_quantize(x, scale, None, name) - x).abs().max()
        assert error <= scale.float().item() * (0.5 + 127.5 * 2.0**-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("absmax", [0.0, 1e-45, 1e-40, 1e-20])
def test_scale_is_never_zero(dtype: torch.dtype, absmax: float) -> None:
    end = torch.tensor([[absmax]])
    for symmetric in (True, False):
        scale, _ = affine.scale_and_zero_point(-end, end, "int4", symmetric=symmetric, scale_dtype=dtype)
        assert (scale > 0).all() and (1 / scale.float()).isfinite().all()
    if absmax == 0:
        assert scale.item() == 1


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_a_scale_too_large_for_its_dtype_names_the_cure(symmetric: bool) -> None:
    end = torch.tensor([[1e7]])
    with pytest.raises(CanopyError, match="does not fit in torch.float16; use scale_dtype=torch.float32"):
        affine.scale_and_zero_point(-end, end, "int4", symmetric=symmetric, scale_dtype=torch.float16)


def test_a_nan_range_is_refused() -> None:
    with pytest.raises(CanopyError, match="scale of nan"):
        affine.scale_and_zero_point(torch.tensor([torch.nan]), torch.tensor([1.0]), "int4")


def test_float_grids_have_no_zero_point() -> None:
    with pytest.raises(CanopyError, match="fp8_e4m3 .* no zero point; use symmetric=True"):
        affine.scale_and_zero_point(torch.tensor([-1.0]), torch.tensor([1.0]), "fp8", symmetric=False)


# Dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_input_is_divided_in_float32(dtype: torch.dtype) -> None:
    x = sample().to(dtype)
    scale, zero_point = affine.scale_and_zero_point(*ends(x), "int8", symmetric=False)
    wide = affine.quantize(x.float(), scale.float(), zero_point, "int8")
    assert torch.equal(affine.quantize(x, scale, zero_point, "int8"), wide)
    assert affine.fake_quantize(x, scale, zero_point, "int8").dtype == dtype


def test_integer_ends_give_a_float32_scale() -> None:
    scale, _ = affine.scale_and_zero_point(torch.tensor([-7]), torch.tensor([15]), "int4")
    assert scale.dtype == torch.float32 and scale.item() == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_lowest_code_saturates_at_the_end_of_the_dtype(dtype: torch.dtype) -> None:
    # −absmax has code −8 = −7.5 rounded, and −8 · scale lies beyond what the dtype can hold.
    end = torch.finfo(dtype).max
    x = torch.tensor([[-end, end]], dtype=dtype)
    scale, _ = affine.scale_and_zero_point(*ends(x), "int4", scale_dtype=dtype)
    restored = affine.fake_quantize(x, scale, None, "int4")
    assert restored.isfinite().all()
    assert ((restored.double() - x.double()).abs() <= 0.51 * scale.double()).all()


def test_nothing_given_is_modified() -> None:
    x = sample()
    before = x.clone()
    scale, zero_point = affine.scale_and_zero_point(*ends(x), "int4", symmetric=False)
    codes = affine.quantize(x, scale, zero_point, "int4")
    kept = codes.clone()
    affine.dequantize(codes, scale, zero_point, "int4")
    assert torch.equal(x, before) and torch.equal(codes, kept)
