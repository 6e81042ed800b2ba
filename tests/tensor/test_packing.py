"""Packed words against a bit stream written with Python's own integers, compressed-tensors, and values by hand."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.tensor.packing import pack, unpack

WIDTHS = range(1, 9)


def slow_pack(codes: list[int], bits: int, signed: bool) -> list[int]:
    """One row as one big number, cut into 32-bit words."""
    offset = 2 ** (bits - 1) if signed else 0
    stream = sum((code + offset) << (i * bits) for i, code in enumerate(codes))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(math.ceil(len(codes) * bits / 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@st.composite
def code_tensors(draw: st.DrawFn) -> tuple[Tensor, int, bool]:
    bits, signed = draw(st.integers(1, 8)), draw(st.booleans())
    shape = draw(st.lists(st.integers(1, 3), max_size=2).map(tuple)) + (draw(st.integers(1, 70)),)
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    seed = draw(st.integers(0, 2**32 - 1))
    dtype = draw(st.sampled_from([torch.int8 if signed else torch.uint8, torch.int16, torch.int32, torch.int64]))
    codes = torch.randint(lo, hi + 1, shape, generator=torch.Generator().manual_seed(seed))
    return codes.to(dtype), bits, signed


@given(code_tensors())
def test_words_equal_the_slow_bit_stream_and_unpack_to_the_codes(case: tuple[Tensor, int, bool]) -> None:
    codes, bits, signed = case
    words = pack(codes, bits, signed=signed)
    n = codes.shape[-1]
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert words.shape == (*codes.shape[:-1], math.ceil(n * bits / 32))
    assert words.reshape(-1, words.shape[-1]).tolist() == [
        slow_pack(row, bits, signed) for row in codes.reshape(-1, n).tolist()
    ]
    again = unpack(words, bits, n, signed=signed)
    assert again.dtype == (torch.int8 if signed else torch.uint8) and again.shape == codes.shape
    assert torch.equal(again.long(), codes.long())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [1, 20, 32, 100, 128])
def test_words_equal_compressed_tensors(bits: int, n: int) -> None:
    generator = torch.Generator().manual_seed(bits * n)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, n), generator=generator).to(torch.int8)
    theirs = pack_to_int32(codes, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, n), unpack_from_int32(theirs, bits, codes.shape))


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [
        pytest.param([-8, -7, -1, 0, 1, 2, 6, 7], 4, [0xFEA98710], id="int4"),
        pytest.param([-128, -1, 0, 127], 8, [0xFF807F00], id="int8"),
        pytest.param([-8, -7, -6, -5, -4, -3, -2, -1], 4, [0x76543210], id="zero points, group 0"),
        pytest.param([0, 1, 2, 3, 4, 5, 6, 7], 4, [0xFEDCBA98], id="zero points, group 1"),
        pytest.param([-8] * 20, 4, [0, 0, 0], id="20 codes take three words"),
        pytest.param([1] * 11, 3, [0b01101101101101101101101101101101, 1], id="int3 straddles a word"),
    ],
)
def test_values_by_hand(codes: list[int], bits: int, words: list[int]) -> None:
    packed = pack(torch.tensor(codes), bits)
    assert [word & 0xFFFFFFFF for word in packed.tolist()] == words
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_the_first_code_is_the_low_nibble_of_the_first_byte() -> None:
    words = pack(torch.tensor([1, 2, 0, 0, 0, 0, 0, 0]), 4, signed=False)
    assert words.numpy().astype("<i4").tobytes() == bytes([0x21, 0, 0, 0])


@pytest.mark.parametrize("bits", WIDTHS)
def test_views_pack_like_copies_and_share_nothing(bits: int) -> None:
    base = torch.randint(0, 2**bits, (33, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for codes in (base[1:, 1:], base.T, base.flatten()[3:], base[:, ::2], base):
        before = codes.clone()
        words = pack(codes, bits, signed=False)
        assert torch.equal(words, pack(codes.clone(memory_format=torch.contiguous_format), bits, signed=False))
        words.zero_()
        assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [1, 5, 32])
def test_strides_of_single_rows_do_not_matter(bits: int, n: int) -> None:
    # A dimension of length one may have any stride and the tensor still counts as contiguous.
    codes = torch.randint(0, 2**bits, (n, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for odd in (codes.T[:1], codes[:, :1], codes.T[:, :1], codes[:1, :1]):
        words = pack(odd, bits, signed=False)
        assert torch.equal(unpack(words, bits, odd.shape[1], signed=False), odd)
        strided = torch.zeros(*words.shape, 3, dtype=torch.int32).movedim(-1, 0).contiguous().movedim(0, -1)[..., 1]
        assert torch.equal(unpack(strided + words, bits, odd.shape[1], signed=False), odd)
        narrow = torch.stack([words, words], dim=-1)[..., 0]
        assert torch.equal(unpack(narrow, bits, odd.shape[1], signed=False), odd)


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_may_be_a_view(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (6, 32), generator=torch.Generator().manual_seed(0))
    words = pack(codes, bits, signed=False)
    assert torch.equal(unpack(words.T.contiguous().T, bits, 32, signed=False).long(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_just_outside_are_refused(bits: int) -> None:
    for signed, lo, hi in [(True, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (False, 0, 2**bits - 1)]:
        for code in (lo - 1, hi + 1):
            with pytest.raises(CanopyError, match=f"do not fit in {bits} bits .{lo}…{hi}.; clamp before packing"):
                pack(torch.tensor([0, code]), bits, signed=signed)


@pytest.mark.parametrize(
    ("words", "n", "message"),
    [
        (torch.zeros(1, dtype=torch.int64), 8, "torch.int64"),
        (torch.zeros(1, dtype=torch.int32), 9, "9 codes of 4 bits take 2 words, got 1"),
        (torch.zeros(3, dtype=torch.int32), 9, "9 codes of 4 bits take 2 words, got 3"),
    ],
    ids=["int64", "too short", "too long"],
)
def test_words_that_do_not_hold_the_codes(words: object, n: int, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        unpack(words, 4, n)  # type: ignore[arg-type]
