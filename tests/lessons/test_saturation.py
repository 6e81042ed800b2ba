"""The end of the range: wrap-around against torch's own cast, clipping against sums by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from canopyq.errors import CanopyError
from canopyq.lessons.saturation import clipped, quantize_without_clamp, wrap
from canopyq.tensor import affine
from canopyq.tensor.quantized_tensor import quantize


def test_150_becomes_minus_106_without_the_clamp_and_127_with_it() -> None:
    x, one = torch.tensor([150.0, -150.0, 127.0, -128.0]), torch.ones(1)
    assert quantize_without_clamp(x, one).tolist() == [-106, 106, 127, -128]
    assert affine.quantize(x, one).tolist() == [127, -128, 127, -128]


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_eight_bits_wrap_as_torch_casts(codes: list[int]) -> None:
    x = torch.tensor(codes)
    assert torch.equal(wrap(x), x.to(torch.int32).to(torch.int8))


@given(st.integers(-(10**6), 10**6), st.integers(2, 8))
def test_what_wraps_keeps_its_lower_bits(code: int, bits: int) -> None:
    left = wrap(torch.tensor([code]), bits).item()
    assert -(2 ** (bits - 1)) <= left < 2 ** (bits - 1) and (left - code) % 2**bits == 0


def test_bfloat16_rounds_up_to_a_code_that_does_not_exist() -> None:
    x = torch.tensor([127.4], dtype=torch.bfloat16)  # kept as 127.5, since bfloat16 has eight significant bits
    assert x.item() == 127.5
    assert quantize_without_clamp(x, torch.ones(1)).item() == -128
    assert quantize_without_clamp(x.float(), torch.ones(1)).item() == -128, "127.5 is a tie and goes to 128 as well"
    assert affine.quantize(x, torch.ones(1)).item() == 127


def test_the_package_never_lets_bfloat16_wrap() -> None:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = x.abs().amax(dim=1, keepdim=True) / 127  # in bfloat16: rounded down for some rows
    naive = quantize_without_clamp(x, scale)
    flipped = (naive.sign() * x.sign() < 0).any(dim=1).float().mean().item()
    assert 0.05 < flipped < 0.95
    codes = quantize(x, "int8", "channel").codes
    assert not bool((codes.sign() * x.float().sign() < 0).any())


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.1])
def test_clipping_and_rounding_add_up(bits: int, share: float) -> None:
    x = torch.randn(777, generator=torch.Generator().manual_seed(bits))
    end = share * x.abs().max()
    found = clipped(x, end, f"int{bits}")
    scale = end / ((2**bits - 1) / 2)
    restored = (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    assert found.error == pytest.approx((restored - x).square().mean().item(), rel=1e-5)
    assert found.share == pytest.approx((x.abs() > end).float().mean().item())
    assert (found.clipping == 0) == (share == 1.0)


def test_a_narrower_range_clips_more_and_rounds_more_finely() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    found = [clipped(x, end, "int4") for end in (4.0, 3.0, 2.0, 1.0)]
    assert [c.share for c in found] == sorted(c.share for c in found)
    assert [c.rounding for c in found] == sorted((c.rounding for c in found), reverse=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_without_clamp(torch.ones(1), torch.ones(1), "fp8"), "no integers to wrap around"),
        (lambda: clipped(torch.ones(3), -1.0), "ends at -1 holds nothing"),
        (lambda: clipped(torch.ones(3), float("nan")), "ends at nan"),
        (lambda: clipped(torch.ones(3), 1.0, "int44"), "unknown format"),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        call()
