"""Keys and values as codes: the layout, the error, the axes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopyq.errors import CanopyError
from canopyq.kv_cache.quantized_kv import QuantizedKV
from canopyq.tensor.formats import CACHE_FORMATS, get_cache_format
from canopyq.tensor.packing import unpack

INTEGERS = ("kv8", "kv4", "kv2")


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers with channels of very different size and place, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape[-1], generator=generator) * 8
    return torch.randn(shape, generator=generator) * spread + torch.randn(shape[-1], generator=generator) * 5


def back(x: torch.Tensor, name: str, per: str, group: int) -> tuple[QuantizedKV, torch.Tensor]:
    quantized = QuantizedKV.quantize(x, get_cache_format(name), per, group)
    return quantized, quantized.dequantize(torch.empty_like(x))


@pytest.mark.parametrize("per", ["channel", "token"])
@settings(max_examples=30)
@given(
    name=st.sampled_from(INTEGERS), heads=st.integers(1, 3), blocks=st.integers(1, 3), dim=st.sampled_from([8, 24, 64]),
    exponent=st.integers(-12, 10), seed=st.integers(0, 99),
)  # fmt: skip
def test_no_number_moves_by_more_than_half_a_step(per, name, heads, blocks, dim, exponent, seed) -> None:
    x = states(2, heads, 64 * blocks, dim, seed=seed) * 2.0**exponent
    quantized, again = back(x, name, per, 8)
    axis, shape = (2, 64) if per == "channel" else (3, 8)
    step = quantized.scale.float().repeat_interleave(shape, dim=axis)
    roundings = x.abs() * 2**-22  # of x − offset and of x̂ to float32
    assert ((again - x).abs() <= step / 2 + roundings).all()


@pytest.mark.parametrize("per", ["channel", "token"])
def test_fp8_is_as_near_as_its_mantissa(per: str) -> None:
    x = states(1, 2, 128, 64)
    quantized, again = back(x, "kv-fp8", per, 64)
    assert quantized.codes.dtype == torch.float8_e4m3fn
    assert quantized.offset is None
    scale = quantized.scale.float().repeat_interleave(64, dim=2 if per == "channel" else 3)
    assert torch.equal(again, quantized.codes.float() * scale)
    assert ((again - x).abs() <= x.abs() * 2**-4 + scale * 2**-10).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_lie_where_kernels_read_them(bits: int) -> None:
    """A second reading of the layout: 32-bit words in the order of compressed-tensors, scale and offset beside them."""
    x = states(2, 3, 128, 128)
    for per, rows in (("channel", (2, 3, 2, 128)), ("token", (2, 3, 128, 2))):
        quantized, again = back(x, f"kv{bits}", per, 64)
        assert quantized.codes.dtype == torch.uint8
        assert quantized.codes.shape == (2, 3, 128, 128 * bits // 8)
        assert quantized.scale.shape == quantized.offset.shape == rows
        assert quantized.scale.dtype == quantized.offset.dtype == torch.float16
        codes = unpack(quantized.codes.view(torch.int32), bits, 128, signed=False)
        axis = 2 if per == "channel" else 3
        scale, offset = (x.float().repeat_interleave(64, dim=axis) for x in (quantized.scale, quantized.offset))
        torch.testing.assert_close(again, codes * scale + offset, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_a_key_channel_that_is_large_everywhere_harms_only_itself(name: str) -> None:
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    x[..., 7] += 100
    error = {per: (back(x, name, per, 64)[1] - x)[..., :7].square().mean() for per in ("channel", "token")}
    if name != "kv-fp8":  # a float has small steps beside large numbers
        assert error["channel"] < error["token"] / 20
    assert error["channel"] <= error["token"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = states(1, 2, 64, 32).to(dtype)
    for name in CACHE_FORMATS:
        quantized, again = back(x, name, "channel", 32)
        assert torch.equal(again, quantized.dequantize(torch.empty(x.shape)).to(dtype))


def test_constant_and_zero_channels_come_back() -> None:
    x = torch.zeros(1, 1, 64, 8)
    x[..., 1] = 3.14159
    for name in CACHE_FORMATS:
        again = back(x, name, "channel", 8)[1]
        assert torch.allclose(again, x, rtol=2**-4 if name == "kv-fp8" else 1e-5, atol=1e-4)


def test_a_part_is_the_same_codes_in_storage_of_its_own() -> None:
    x = states(1, 2, 256, 32)
    whole = QuantizedKV.quantize(x, get_cache_format("kv4"), "channel", 32)
    part = whole.narrow(64, 192)
    alone = QuantizedKV.quantize(x[:, :, 64:192], get_cache_format("kv4"), "channel", 32)
    assert all(torch.equal(a, b) for a, b in zip(part.tensors, alone.tensors, strict=True))
    assert sum(t.untyped_storage().nbytes() for t in part.tensors) == sum(
        t.untyped_storage().nbytes() for t in whole.tensors
    ) / 2  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("name", CACHE_FORMATS)
@pytest.mark.parametrize("value", [6e4, 7e4, 1e30])
def test_what_is_held_is_held_and_the_rest_refused(value: float, name: str, per: str, sign: int) -> None:
    """A scale may fit into float16 where the offset does not."""
    x = torch.full((1, 1, 64, 8), sign * value)
    try:
        held = QuantizedKV.quantize(x, get_cache_format(name), per, 8)
    except CanopyError as error:
        assert value > 65504 and "cannot be cached" in str(error)
        return
    found = held.dequantize(torch.empty_like(x))
    rounding = value * 2**-4 if name == "kv-fp8" else float(held.scale.max()) / 2
    assert float((found - x).abs().max()) <= rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_codes_never_stand_for_infinity(name: str, dtype: torch.dtype) -> None:
    """Ranges are rounded outward, and at the end of float16 there is nothing outside."""
    for most in (6e4, 65504.0):
        x = torch.linspace(-most, most, 512).reshape(1, 1, 64, 8).to(dtype)
        try:
            found = QuantizedKV.quantize(x, get_cache_format(name), "token", 8).dequantize(torch.empty_like(x))
        except CanopyError as error:
            assert "cannot be cached" in str(error) and most > 65000
        else:
            assert bool(found.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_float16_scales_cannot_hold_is_refused(bad: float) -> None:
    x = torch.zeros(1, 1, 64, 8)
    x[0, 0, 5, 3] = bad
    for name in CACHE_FORMATS:
        with pytest.raises(CanopyError, match="cannot be cached"):
            QuantizedKV.quantize(x, get_cache_format(name), "channel", 8)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(CanopyError, match="did you mean 'kv4'"):
        get_cache_format("kv44")
