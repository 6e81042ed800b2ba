"""What each format can hold, against torch's own casts, ml_dtypes, and the published NF4 table."""

from __future__ import annotations

from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.tensor.formats import FORMATS, BlockFormat, FloatFormat, IntFormat, TableFormat, get_format

TORCH_FLOATS = ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"]
INTS = [f"int{bits}" for bits in range(2, 9)]


def bits_of(x: Tensor) -> Tensor:
    """float32 bit patterns: tells −0.0 from 0.0."""
    return x.to(torch.float32).view(torch.int32)


def around_every_tie(fmt: FloatFormat) -> Tensor:
    """All values, the points halfway between neighbours, and the float32 next to those on either side."""
    values = fmt.values()
    ties = ((values[1:] + values[:-1]) / 2).float()
    up, down = torch.full_like(ties, torch.inf), torch.full_like(ties, -torch.inf)
    return torch.cat([values.float(), ties, ties.nextafter(up), ties.nextafter(down), torch.tensor([-0.0])])


def through_ml_dtypes(x: Tensor, dtype: type) -> Tensor:
    return torch.from_numpy(x.numpy().astype(dtype).astype(np.float32))


# Floats ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_FLOATS)
def test_rounding_equals_torch_cast_at_every_value_and_tie(name: str) -> None:
    fmt = get_format(name)
    x = around_every_tie(fmt)
    x = x[x.abs() <= fmt.largest]
    assert torch.equal(bits_of(fmt.round(x)), bits_of(x.to(fmt.dtype)))


@pytest.mark.parametrize("name", [*TORCH_FLOATS, "fp32"])
@given(x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64))
def test_rounding_equals_torch_cast_for_any_number(name: str, x: list[float]) -> None:
    fmt = get_format(name)
    numbers = torch.tensor(x, dtype=torch.float32)
    expected = numbers.clamp(-fmt.largest, fmt.largest).to(fmt.dtype)
    assert torch.equal(bits_of(fmt.round(numbers)), bits_of(expected))
    assert torch.equal(bits_of(fmt.decode(fmt.encode(numbers))), bits_of(expected))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_all_256_codes_survive_decode_and_encode(name: str) -> None:
    fmt = get_format(name)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(fmt.dtype)
    finite = codes[codes.float().isfinite()]
    again = fmt.encode(fmt.decode(finite))
    assert torch.equal(again.view(torch.uint8), finite.view(torch.uint8))
    assert len(finite) == {"fp8_e4m3": 254, "fp8_e5m2": 248}[name]  # FP8 paper, table 1: 2 NaN; 6 NaN and 2 infinities
    assert sorted(set(finite.float().tolist())) == fmt.values().tolist()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_all_256_codes_decode_as_torch_casts_them(name: str) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(get_format(name).dtype)
    for some in (codes, codes.reshape(16, 16).t(), codes[5]):
        values, expected = get_format(name).decode(some), some.to(torch.float32)
        assert torch.equal(values.isnan(), expected.isnan())
        assert torch.equal(bits_of(values.nan_to_num()), bits_of(expected.nan_to_num()))


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_all_65536_patterns_are_the_values(name: str) -> None:
    fmt = get_format(name)
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(fmt.dtype).float()
    finite = patterns[patterns.isfinite()]
    assert torch.equal(bits_of(fmt.round(finite)), bits_of(finite))
    assert torch.equal(finite.double().unique(), fmt.values())


@pytest.mark.parametrize("name", [*TORCH_FLOATS, "fp32"])
def test_extremes_equal_finfo(name: str) -> None:
    fmt = get_format(name)
    info = torch.finfo(fmt.dtype)
    assert fmt.largest == info.max
    assert fmt.smallest_normal == info.smallest_normal
    assert fmt.smallest == info.smallest_normal * info.eps
    assert fmt.bits == info.bits


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        pytest.param(get_format("fp4_e2m1"), ml_dtypes.float4_e2m1fn, id="e2m1"),
        pytest.param(FloatFormat("e2m3", 6, 2, 3, "none"), ml_dtypes.float6_e2m3fn, id="e2m3"),
        pytest.param(FloatFormat("e3m2", 6, 3, 2, "none"), ml_dtypes.float6_e3m2fn, id="e3m2"),
        pytest.param(FloatFormat("e3m4", 8, 3, 4, "ieee"), ml_dtypes.float8_e3m4, id="e3m4"),
        pytest.param(FloatFormat("e4m3", 8, 4, 3, "nan"), ml_dtypes.float8_e4m3fn, id="e4m3"),
    ],
)
def test_formats_without_torch_dtype_equal_ml_dtypes(fmt: FloatFormat, dtype: type) -> None:
    x = around_every_tie(fmt)
    x = x[x.abs() <= fmt.largest]
    expected = through_ml_dtypes(x, dtype)
    assert torch.equal(bits_of(fmt.round(x)), bits_of(expected))
    codes = fmt.encode(x)
    assert torch.equal(bits_of(fmt.decode(codes)), bits_of(expected))
    assert torch.equal(codes, torch.from_numpy(x.numpy().astype(dtype).view(np.uint8)))  # the bit patterns themselves


def test_fp4_holds_the_eight_magnitudes_of_the_ocp_specification() -> None:
    fmt = get_format("fp4")
    assert fmt.magnitudes().tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert torch.equal(fmt.encode(fmt.decode(torch.arange(16, dtype=torch.uint8))), torch.arange(16, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"])
def test_beyond_the_largest_value_saturates(name: str) -> None:
    fmt = get_format(name)
    x = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, fmt.largest])
    expected = torch.tensor([1, -1, 1, -1, 1]) * torch.tensor(fmt.largest).clamp(max=3e38)
    assert torch.equal(fmt.round(x).clamp(-3e38, 3e38), expected)
    assert torch.equal(fmt.decode(fmt.encode(x)).clamp(-3e38, 3e38), expected)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"])
def test_nan_stays_nan_in_round(name: str) -> None:
    assert get_format(name).round(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.parametrize("name", [*TORCH_FLOATS, "fp4_e2m1"])
def test_step_is_the_distance_to_the_next_value(name: str) -> None:
    fmt = get_format(name)
    magnitudes = fmt.magnitudes()
    assert torch.equal(fmt.step(magnitudes[:-1]), magnitudes[1:] - magnitudes[:-1])
    assert fmt.step(torch.tensor([0.0])).item() == fmt.smallest
    top = magnitudes[-1] - magnitudes[-2]
    assert torch.equal(fmt.step(torch.tensor([fmt.largest, -torch.inf])), torch.stack([top, top]))


def test_values_of_fp32_are_too_many_to_list() -> None:
    with pytest.raises(ValueError, match="too many to list"):
        get_format("fp32").values()


# Integers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTS)
def test_integers_are_twos_complement(name: str) -> None:
    fmt = get_format(name)
    assert (fmt.qmin, fmt.qmax) == (-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1)
    assert fmt.values().tolist() == list(range(fmt.qmin, fmt.qmax + 1))
    assert fmt.largest == fmt.qmax
    codes = fmt.values().to(torch.int8)
    assert torch.equal(fmt.encode(fmt.decode(codes)), codes)


def test_integers_round_half_to_even_and_saturate() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 6.9, 7.5, 99.0, -8.5, -99.0])
    assert get_format("int4").encode(x).tolist() == [0, 2, 2, 0, -2, 7, 7, 7, -8, -8]


@pytest.mark.parametrize("bits", [0, 1, 9, 16, -4])
def test_integers_that_do_not_fit_a_byte_are_refused(bits: int) -> None:
    with pytest.raises(CanopyError, match=f"{bits} bits.*use 2 to 8"):
        IntFormat("odd", bits)


# Tables ---------------------------------------------------------------------------------------------------------------


def test_nf4_table_follows_from_its_definition() -> None:
    # QLoRA's published code: eight quantiles above zero, seven below, the outermost at 0.9677083, scaled to ±1.
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    expected = np.array(sorted([*above, 0.0, *below]))
    np.testing.assert_allclose(get_format("nf4").values().numpy(), expected / expected.max(), atol=2e-7)


def test_nf4_table_has_sixteen_sorted_values_and_an_exact_zero() -> None:
    values = get_format("nf4").values().tolist()
    assert len(values) == 16 and values == sorted(set(values))
    assert (values[0], values[7], values[15]) == (-1.0, 0.0, 1.0)
    assert get_format("nf4").largest == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nf4_takes_the_nearest_value(dtype: torch.dtype) -> None:
    fmt = get_format("nf4")
    x = torch.linspace(-1.2, 1.2, 2001).to(dtype)
    nearest = (x.double().unsqueeze(1) - fmt.values()).abs().min(dim=1).values
    reached = (x.double() - fmt.values()[fmt.encode(x).long()]).abs()
    torch.testing.assert_close(reached, nearest, rtol=0, atol=1e-7)
    assert torch.equal(fmt.encode(fmt.decode(torch.arange(16))), torch.arange(16, dtype=torch.uint8))


def test_any_table_makes_a_format() -> None:
    fmt = TableFormat("ternary-ish", 2, (-1.0, 0.0, 0.25, 1.0))
    assert fmt.encode(torch.tensor([-0.6, -0.4, 0.2, 0.7])).tolist() == [0, 1, 2, 3]


# Blocks and names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size", "second"), [("mxfp4", 32, False), ("nvfp4", 16, True)])
def test_block_formats_hold_fp4_elements(name: str, size: int, second: bool) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, BlockFormat)
    assert (fmt.block_size, fmt.has_global_scale, fmt.largest, fmt.bits) == (size, second, 6.0, 4)
    assert torch.equal(fmt.values(), get_format("fp4").values())


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_idempotent_and_keeps_the_values(name: str) -> None:
    fmt = get_format(name)
    x = fmt.round(torch.linspace(-1, 1, 401) * min(fmt.largest, 1e30))
    assert torch.equal(fmt.round(x), x)
    assert x.dtype == torch.float32


@pytest.mark.parametrize(
    ("alias", "name"),
    [("fp8", "fp8_e4m3"), ("E5M2", "fp8_e5m2"), ("FP8-E4M3", "fp8_e4m3"), ("fp4", "fp4_e2m1"), ("INT4", "int4")],
)
def test_aliases(alias: str, name: str) -> None:
    assert get_format(alias) is FORMATS[name]


def test_a_format_stands_for_itself() -> None:
    assert get_format(FORMATS["nf4"]) is FORMATS["nf4"]


@pytest.mark.parametrize(
    ("given", "suggestion"),
    [("int44", "int4"), ("nf-4", "nf4"), ("mxfp8", "mxfp4"), ("bf61", "bf16"), ("uint8", "int8")],
)
def test_unknown_names_suggest_the_nearest(given: str, suggestion: str) -> None:
    with pytest.raises(CanopyError, match=f"unknown format '{given}'; did you mean .*'{suggestion}'"):
        get_format(given)


@pytest.mark.parametrize("given", [None, 4, "", object(), torch.float16], ids=["None", "4", "empty", "object", "dtype"])
def test_what_is_no_name_at_all_lists_the_known_ones(given: object) -> None:
    with pytest.raises(CanopyError, match="unknown format .* known: fp32, "):
        get_format(given)  # type: ignore[arg-type]
