"""Keys and values as codes: 8, 4 or 2 bits, or FP8, in blocks of 64 tokens.

Keys have a few channels that are large in every token, so a key channel gets a scale of its own within a block of
tokens. Values have no such channels, and a token is read as a whole: each gets its own scale (KIVI: Liu et al. 2024,
section 3.2).

    codes = clamp(round((x − offset) / scale), 0, 2^bits − 1)          x̂ = codes · scale + offset
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.tensor.formats import e4m3_to_float, get_format
from canopyq.tensor.packing import pack_bytes, unpack_bytes

BLOCK = 64  # tokens that are quantized together, and whose key channels share a scale
TILE = 2**19  # numbers that are dequantized at a time on a CPU: 2 MB of float32
WINDOW = 32  # newest tokens that stay in full precision, besides those of a block that is not full
GROUP = 64  # channels of one token that share a scale
_FP8 = get_format("fp8_e4m3")


@dataclass(frozen=True)
class CacheFormat:
    """What a cached number is rounded to: unsigned integers of ``bits`` bits, or E4M3."""

    name: str
    bits: int
    is_float: bool = False


CACHE_FORMATS = {f.name: f for f in (*(CacheFormat(f"kv{b}", b) for b in (8, 4, 2)), CacheFormat("kv-fp8", 8, True))}


def get_cache_format(name: str | CacheFormat) -> CacheFormat:
    """The format called ``name``: kv8, kv4, kv2 or kv-fp8. Raises `CanopyError` for one that does not exist."""
    if isinstance(name, CacheFormat):
        return name
    return CACHE_FORMATS[checks.choice("KV cache", name.lower() if isinstance(name, str) else name, CACHE_FORMATS)]


@dataclass(frozen=True)
class QuantizedStates:
    """Keys or values (B, H, T, D) as codes, T a multiple of 64. Never changed in place.

    Attributes:
        codes: uint8 (B, H, T, D · bits / 8), packed along D with the first code in the lowest bits; for FP8
            float8_e4m3fn (B, H, T, D).
        scale: float16. Per channel (B, H, T / 64, D), per token (B, H, T, D / group).
        offset: like ``scale``: what code 0 stands for. None for FP8.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    format: CacheFormat
    per: str

    @classmethod
    def quantize(cls, x: Tensor, format: CacheFormat, per: str = "token", group: int = GROUP) -> QuantizedStates:
        """The codes of whole blocks.

        Ranges are rounded outward to float16, so that nothing is clipped: |x − x̂| is at most scale / 2.

        Args:
            x: (B, H, T, D) float, T a multiple of 64, D of ``group``, D · bits of 8.
            per: ``"channel"``: a scale for each channel of a block; ``"token"``: for each group of a token's channels.

        Raises:
            CanopyError: for NaN, infinity, and what float16 scales and offsets, or x's dtype after rounding, cannot
                hold.
        """
        work, axis = _split(x.float(), per, group)
        lo, hi = torch.aminmax(work, dim=axis, keepdim=True)
        if format.is_float:
            offset, scale = None, _upward(torch.maximum(-lo, hi) / _FP8.largest)
            low, reach = -scale.float() * _FP8.largest, scale.float() * _FP8.largest
        else:
            offset = _downward(lo)
            scale = _upward((hi - offset.float()) / (2**format.bits - 1))
            low, reach = offset.float(), offset.float() + scale.float() * (2**format.bits - 1)
        # So put, NaN fails. What codes stand for goes beyond the values, and has to fit into their dtype again.
        most = torch.finfo(x.dtype).max
        if not bool(((lo >= low) & (hi <= reach) & (low >= -most) & (reach <= most)).all()):
            raise CanopyError(
                f"keys or values between {lo.min().item():.3g} and {hi.max().item():.3g} cannot be cached; they must "
                f"be finite, scale and offset within float16, and all that a code can stand for within {x.dtype}"
            )
        if format.is_float:
            codes = _FP8.encode(work / scale.float()).reshape(x.shape)
        else:
            codes = (work - offset.float()).div_(scale.float()).round_().clamp_(0, 2**format.bits - 1)
            codes = pack_bytes(codes.to(torch.uint8).reshape(x.shape), format.bits)
            offset = offset.squeeze(axis)
        return cls(codes, scale.squeeze(axis), offset, format, per)

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return (self.codes, self.scale) if self.offset is None else (self.codes, self.scale, self.offset)

    def dequantize(self, out: Tensor) -> Tensor:
        """Write x̂ into ``out`` (B, H, T, D), of any float dtype, computed in float32, or in float64 if that is its."""
        for start, part in self.tiles():
            part._dequantize(out[:, :, start : start + part.tokens])
        return out

    def _dequantize(self, out: Tensor) -> None:
        work = torch.promote_types(out.dtype, torch.float32)
        codes, scale = self.codes, self.scale.to(work)
        if self.format.is_float:
            codes, scale = e4m3_to_float(codes).to(work), scale * 256
        else:
            codes = unpack_bytes(codes, self.format.bits).to(work)
        codes, axis = _split(codes, self.per, self.group)
        out, _ = _split(out, self.per, self.group)
        if self.offset is None:
            out.copy_(codes.mul_(scale.unsqueeze(axis)))
        elif self.per == "channel" and out.dtype == work:  # neighbours have scales of their own: one pass
            torch.addcmul(self.offset.to(work).unsqueeze(axis), codes, scale.unsqueeze(axis), out=out)
        else:
            torch.add(codes.mul_(scale.unsqueeze(axis)), self.offset.to(work).unsqueeze(axis), out=out)

    @property
    def group(self) -> int:
        """Channels of a token that share a scale; per channel it is 1."""
        return self.codes.shape[3] * (1 if self.format.is_float else 8 // self.format.bits) // self.scale.shape[3]

    def tiles(self) -> Iterator[tuple[int, QuantizedStates]]:
        """The tokens in parts, each with the number of its first token. On a CPU what is computed from a part stays in
        the processor's cache, and never more than a part is dequantized; elsewhere all is one part."""
        tokens = self.tokens
        if self.codes.device.type == "cpu":
            batch, heads, _, width = self.codes.shape
            row = batch * heads * width * 8 // self.format.bits
            tokens = max(1, TILE // max(1, row * BLOCK)) * BLOCK
        if tokens >= self.tokens:
            yield 0, self
            return
        for start in range(0, self.tokens, tokens):
            yield start, self.part(start, min(start + tokens, self.tokens))

    def part(self, start: int, stop: int) -> QuantizedStates:
        """A view of the tokens from ``start`` to ``stop``, both multiples of 64."""
        return self.map(lambda x: _rows(x, start, stop, self.tokens))

    def append(self, other: QuantizedStates) -> QuantizedStates:
        """These tokens, then the other's."""
        return self._from(torch.cat(pair, 2) for pair in zip(self.tensors, other.tensors, strict=True))

    def narrow(self, start: int, stop: int) -> QuantizedStates:
        """The tokens from ``start`` to ``stop``, both multiples of 64, in storage of their own."""

        return self.part(start, stop).map(torch.clone)

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedStates:
        """``change`` done to every tensor."""
        return self._from(change(x) for x in self.tensors)

    def _from(self, tensors) -> QuantizedStates:
        codes, scale, *offset = tensors
        return QuantizedStates(codes, scale, offset[0] if offset else None, self.format, self.per)


def _rows(x: Tensor, start: int, stop: int, tokens: int) -> Tensor:
    """The part of one of the tensors that belongs to some tokens: 64 of them may share a row."""
    per_row = tokens // x.shape[2]
    return x[:, :, start // per_row : stop // per_row]


def _split(x: Tensor, per: str, group: int) -> tuple[Tensor, int]:
    """``x`` with one more dimension, along which numbers share a scale, and which one that is."""
    return (x.unflatten(2, (-1, BLOCK)), 3) if per == "channel" else (x.unflatten(3, (-1, group)), 4)


# float16 rounds by at most 2^−11 of a number: moved by 2^−10 first, it cannot end on the wrong side.
def _downward(x: Tensor) -> Tensor:
    return (x - x.abs() * 2**-10).half()


def _upward(x: Tensor) -> Tensor:
    return (x * (1 + 2**-10)).clamp(min=torch.finfo(torch.float16).smallest_normal).half()
