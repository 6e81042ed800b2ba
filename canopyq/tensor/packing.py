"""Integers to 32-bit words and back, in the order of compressed-tensors' ``pack-quantized``.

Codes of b bits lie one after the other in a row's bit stream, the first in the lowest bits; the stream is cut into
int32 words and a row's last word is filled up with zeros. Eight 4-bit codes make a word, so that in a little-endian
file the first code is the low nibble of the first byte. Signed codes are stored with an offset of 2^(b−1), so −8…7
becomes 0…15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError, shown

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # one that holds so many bytes


def pack(codes: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """Pack along the last dimension.

    Args:
        codes: (…, n) integers, in [−2^(bits−1), 2^(bits−1) − 1] if ``signed``, else in [0, 2^bits − 1].
        bits: 1 to 8.

    Returns:
        int32 (…, ceil(n · bits / 32)).

    Raises:
        CanopyError: for another width, a float tensor, or a code that does not fit.
    """
    _check(codes, bits, signed)
    offset = 2 ** (bits - 1) if signed else 0
    return pack_unchecked(codes, bits, offset)


def pack_unchecked(codes: Tensor, bits: int, offset: int) -> Tensor:
    """`pack` for codes that are known to fit: what the quantizers call."""
    *lead, n = codes.shape
    unsigned = (codes + offset).to(torch.uint8) if offset else codes.to(torch.uint8, copy=True)
    words = -(-n * bits // 32)
    per_block = 32 if 32 % bits else 32 // bits  # the fewest codes that fill whole words
    padded = -(-n // per_block) * per_block
    if padded != n:
        unsigned = torch.nn.functional.pad(unsigned, (0, padded - n))
    if 8 % bits == 0:
        packed = pack_bytes(unsigned, bits).flatten().view(torch.int32).reshape(*lead, -1)
    else:
        packed = _pack_stream(unsigned.reshape(*lead, -1, 32), bits).reshape(*lead, -1)
    return packed[..., :words].contiguous()


def unpack(words: Tensor, bits: int, n: int, *, signed: bool = True) -> Tensor:
    """The inverse of `pack`: (…, n) codes, int8 if ``signed``, else uint8.

    Raises:
        CanopyError: for another width, if ``words`` is not int32, or not as long as ``n`` codes are.
    """
    checks.count("bits", bits, 1, 8), checks.count("n", n, 1), checks.flag("signed", signed)
    if not isinstance(words, Tensor) or words.dtype != torch.int32 or words.dim() == 0:
        raise CanopyError(f"words is {shown(words)}; unpack takes int32 (…, words)")
    if words.shape[-1] != -(-n * bits // 32):
        raise CanopyError(f"{n} codes of {bits} bits take {-(-n * bits // 32)} words, got {words.shape[-1]}")
    if 8 % bits == 0:
        codes = unpack_bytes(words.clone(memory_format=torch.contiguous_format).view(torch.uint8), bits)
    else:
        *lead, count = words.shape
        words = torch.nn.functional.pad(words, (0, -count % bits))
        codes = _unpack_stream(words.reshape(*lead, -1, bits), bits).reshape(*lead, -1)
    codes = codes[..., :n]
    return (codes.view(torch.int8) - 2 ** (bits - 1)) if signed else codes.contiguous()


def pack_bytes(unsigned: Tensor, bits: int) -> Tensor:
    """Codes whose width divides a byte, 8 / bits to a byte, the first in the lowest bits.

    Args:
        unsigned: uint8 (…, n), n a multiple of 8 / bits; nothing is checked.

    Returns:
        uint8 (…, n · bits / 8).
    """
    while bits < 8:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << bits)
        bits *= 2
    return unsigned.contiguous()


def unpack_bytes(data: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bytes`: uint8 (…, n). ``data`` is contiguous; 8 bits come back as they are.

    A byte becomes a word with room for all of its codes. Then fields are halved until each has a byte of its own: the
    upper halves move up, and what is left behind is masked off. That is several times faster than one shift per code.
    """
    if bits == 8:
        return data
    fields, width = 8 // bits, 8
    word = data.to(_WORD[fields])
    while width > bits:
        width //= 2
        shift = (fields - 1) * width
        kept = sum((2**width - 1) << (i * width * fields) for i in range(8 // width))
        # A field and its copy do not overlap, so both can be added by one multiplication; of two codes a byte they do.
        word = word.mul_(1 + 2**shift) if fields > 2 else (word << shift).bitwise_or_(word)
        word = word.bitwise_and_(kept)
    return word.view(torch.uint8)


def _check(codes: Tensor, bits: int, signed: bool) -> None:
    checks.count("bits", bits, 1, 8), checks.flag("signed", signed)
    if not isinstance(codes, Tensor) or codes.dtype not in INTEGERS or codes.dim() == 0:
        raise CanopyError(f"codes is {shown(codes)}; pack takes integers (…, n)")
    checks.with_values("codes", codes)
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    least, most = (int(v) for v in codes.aminmax())
    if least < lo or most > hi:
        raise CanopyError(f"codes {least}…{most} do not fit in {bits} bits ({lo}…{hi}); clamp before packing")


def _pack_stream(blocks: Tensor, bits: int) -> Tensor:
    """Other widths: 32 codes fill exactly ``bits`` words, and a code may straddle two of them."""
    codes = blocks.movedim(-1, 0).to(torch.int32)  # one after the other in memory: many times as fast as in place
    words = codes.new_zeros(bits, *codes.shape[1:])
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] |= codes[i] << shift
        if shift + bits > 32:
            words[word + 1] |= codes[i] >> (32 - shift)
    return words.movedim(0, -1)


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    columns = words.movedim(-1, 0).contiguous()
    codes = torch.empty(*words.shape[:-1], 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = columns[word] >> shift
        if shift + bits > 32:
            code = (code & (2 ** (32 - shift) - 1)) | (columns[word + 1] << (32 - shift))
        codes[..., i] = code & (2**bits - 1)
    return codes
