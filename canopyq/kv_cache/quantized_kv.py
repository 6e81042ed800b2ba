"""Keys and values as codes: 8, 4 or 2 bits, or FP8, in blocks of 64 tokens.

Keys have a few channels that are large in every token, so a key channel gets a scale of its own within a block of
tokens. Values have no such channels, and a token is read as a whole: each gets its own scale (KIVI: Liu et al. 2024,
section 3.2).

    codes = clamp(round((x − offset) / scale), 0, 2^bits − 1)          x̂ = codes · scale + offset
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.tensor.formats import KV_BLOCK, KV_GROUP_SIZE, CacheFormat, e4m3_to_float, get_format
from canopyq.tensor.packing import pack_bytes, unpack_bytes

TILE = 2**19  # numbers that are dequantized at a time on a CPU: 2 MB of float32
_FP8 = get_format("fp8_e4m3")


@dataclass(frozen=True)
class QuantizedKV:
    """Keys or values (B, H, T, D) as codes, T a multiple of 64.

    Attributes:
        codes: uint8 (B, H, T, D · bits / 8), packed along D with the first code in the lowest bits; for FP8
            float8_e4m3fn (B, H, T, D).
        scale: float16. Per channel (B, H, T / 64, D), per token (B, H, T, D / group_size).
        offset: like ``scale``: what code 0 stands for. None for FP8.
        format: of the codes.
        granularity: ``"channel"``: a scale for each channel of a block; ``"token"``: for each group of a token's
            channels.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    format: CacheFormat
    granularity: str

    @classmethod
    def quantize(
        cls, x: Tensor, format: CacheFormat, granularity: str = "token", group_size: int = KV_GROUP_SIZE
    ) -> QuantizedKV:
        """The codes of whole blocks.

        Ranges are rounded outward to float16, so that nothing is clipped: |x − x̂| is at most scale / 2.

        Args:
            x: (B, H, T, D) float, T a multiple of 64, D of ``group_size``, D · bits of 8.
            granularity, group_size: which numbers share a scale; per channel there are no groups.

        Raises:
            CanopyError: for NaN, infinity, and what float16 scales and offsets, or x's dtype after rounding, cannot
                hold.
        """
        work, axis = _split(x.float(), granularity, group_size)
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
        return cls(codes, scale.squeeze(axis), offset, format, granularity)

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, int, int, int],
        format: CacheFormat,
        granularity: str,
        group_size: int,
        device: torch.device | str,
    ) -> QuantizedKV:
        """Memory for tokens to come, (B, H, T, D)."""
        batch, heads, tokens, head_dim = shape
        scales = (tokens // KV_BLOCK, head_dim) if granularity == "channel" else (tokens, head_dim // group_size)
        row = head_dim * format.bits // 8
        codes = torch.zeros(batch, heads, tokens, row, dtype=format.code_dtype, device=device)
        scale = torch.zeros(batch, heads, *scales, dtype=torch.float16, device=device)
        return cls(codes, scale, None if format.is_float else torch.zeros_like(scale), format, granularity)

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def head_dim(self) -> int:
        return self.codes.shape[3] * 8 // self.format.bits

    @property
    def group_size(self) -> int:
        """Channels of a token that share a scale; per channel it is 1."""
        return self.head_dim // self.scale.shape[3]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scale, and offset if there is one: all the memory behind it."""
        return (self.codes, self.scale) if self.offset is None else (self.codes, self.scale, self.offset)

    def dequantize(self, out: Tensor) -> Tensor:
        """Write x̂ into ``out`` (B, H, T, D), of any float dtype, computed in float32, or in float64 if that is its."""
        for start, part in self.tiles():
            part._dequantize(out[:, :, start : start + part.tokens])
        return out

    def _dequantize(self, out: Tensor) -> None:
        dtype = torch.promote_types(out.dtype, torch.float32)
        codes, scale = self.unscaled(dtype)
        codes, axis = _split(codes, self.granularity, self.group_size)
        out, _ = _split(out, self.granularity, self.group_size)
        if self.offset is None:
            out.copy_(codes.mul_(scale.unsqueeze(axis)))
        elif self.granularity == "channel" and out.dtype == dtype:  # neighbours have scales of their own: one pass
            torch.addcmul(self.offset.to(dtype).unsqueeze(axis), codes, scale.unsqueeze(axis), out=out)
        else:
            torch.add(codes.mul_(scale.unsqueeze(axis)), self.offset.to(dtype).unsqueeze(axis), out=out)

    def unscaled(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Codes (B, H, T, D) in a dtype, and the scales that they are to be multiplied by."""
        if self.format.is_float:
            return e4m3_to_float(self.codes).to(dtype), self.scale.to(dtype) * 256
        return unpack_bytes(self.codes, self.format.bits).to(dtype), self.scale.to(dtype)

    def tiles(self) -> Iterator[tuple[int, QuantizedKV]]:
        """The tokens in parts, each with the number of its first token. On a CPU what is computed from a part stays in
        the processor's cache, and never more than a part is dequantized; elsewhere all is one part."""
        tokens = self.tokens
        if self.codes.device.type == "cpu":
            batch, heads, *_ = self.codes.shape
            tokens = max(1, TILE // max(1, batch * heads * self.head_dim * KV_BLOCK)) * KV_BLOCK
        if tokens >= self.tokens:
            yield 0, self
            return
        for start in range(0, self.tokens, tokens):
            yield start, self.part(start, min(start + tokens, self.tokens))

    def part(self, start: int, stop: int) -> QuantizedKV:
        """A view of the tokens from ``start`` to ``stop``, both multiples of 64."""
        return self.map(lambda x: _rows(x, start, stop, self.tokens))

    def append(self, other: QuantizedKV) -> QuantizedKV:
        """These tokens, then the other's."""
        return self._from(torch.cat(pair, 2) for pair in zip(self.tensors, other.tensors, strict=True))

    def narrow(self, start: int, stop: int) -> QuantizedKV:
        """The tokens from ``start`` to ``stop``, both multiples of 64, in storage of their own."""
        return self.part(start, stop).map(torch.clone)

    def write(self, start: int, x: Tensor) -> None:
        """Quantize whole blocks ``x`` (B, H, n, D) in place of the tokens from ``start`` on, a multiple of 64."""
        new = QuantizedKV.quantize(x, self.format, self.granularity, self.group_size)
        for to, tensor in zip(self.part(start, start + new.tokens).tensors, new.tensors, strict=True):
            to.copy_(tensor)

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedKV:
        """``change`` done to every tensor."""
        return self._from(change(x) for x in self.tensors)

    def _from(self, tensors: Iterable[Tensor]) -> QuantizedKV:
        codes, scale, *offset = tensors
        return QuantizedKV(codes, scale, offset[0] if offset else None, self.format, self.granularity)


@dataclass(frozen=True, eq=False)
class KVView:
    """All that attention reads of one layer: older tokens as codes, newer ones as they are.

    A growing cache has T tokens as codes and R after them. In a cache of fixed size (``before`` is given) T and R are
    capacities: of n tokens that came before a pass, whole blocks that ``residual_length`` more tokens have followed are
    codes, token t of the rest lies at t modulo R.

    Attributes:
        quantized_keys, quantized_values: (B, H, T, D); None where no token is quantized.
        keys, values: (B, H, R, D) in the model's dtype, the pass's own tokens included. Their D may differ.
        before: int32 (1,) on the device, tokens that came before the pass; None for a growing cache.
        residual_length: tokens, see above.
        tokens_before, new_tokens: what ``before`` was when the pass was made (in a replay of a graph it is more), and
            how many tokens the pass brings. Of a cache of fixed size.

    Raises:
        CanopyError: for shapes, dtypes, devices and formats that do not fit together.
    """

    quantized_keys: QuantizedKV | None
    quantized_values: QuantizedKV | None
    keys: Tensor
    values: Tensor
    before: Tensor | None = None
    residual_length: int = 0
    tokens_before: int = 0
    new_tokens: int = 0

    def __post_init__(self) -> None:
        keys, values, codes = self.keys, self.values, self.quantized_keys
        alike = (values.shape[:3], values.dtype, values.device) == (keys.shape[:3], keys.dtype, keys.device)
        if not alike or keys.dim() != 4 or values.dim() != 4:
            raise CanopyError(
                f"recent keys and values are (B, heads, R, D) alike, got {_words(keys)} and {_words(values)}"
            )
        if codes is not None:
            self._check_codes(codes, self.quantized_values)
        if self.before is not None:
            checks.operand("before", self.before, (1,), torch.int32, keys.device)
        if self.residual_length < 0 or (self.before is not None and keys.shape[2] % KV_BLOCK):
            raise CanopyError(
                f"a ring of recent tokens is a multiple of {KV_BLOCK} long, and what stays in it 0 or more; got "
                f"{keys.shape[2]} and {self.residual_length}"
            )

    def _check_codes(self, keys: QuantizedKV, values: QuantizedKV | None) -> None:
        format, tokens, device = keys.format, keys.tokens, self.keys.device
        if values is None or values.format != format or tokens % KV_BLOCK:
            raise CanopyError(
                f"quantized keys and values are of one format, in blocks of {KV_BLOCK} tokens; got {tokens} tokens in "
                f"{format.name} and {'none' if values is None else values.format.name}"
            )
        for name, kv, recent in (("key", keys, self.keys), ("value", values, self.values)):
            batch, heads, _, head_dim = recent.shape
            groups = kv.scale.shape[-1]
            scales = (tokens // KV_BLOCK, head_dim) if kv.granularity == "channel" else (tokens, groups)
            if not groups or head_dim % groups:
                raise CanopyError(f"{name}_scale has {groups} groups, which do not divide {head_dim} channels")
            if (kv.offset is None) != format.is_float:
                what = "is missing" if kv.offset is None else "is for integer codes only"
                raise CanopyError(f"{name}_offset {what} with {format.name}")
            row = head_dim * format.bits // 8
            checks.operand(f"{name}_codes", kv.codes, (batch, heads, tokens, row), format.code_dtype, device)
            checks.operand(f"{name}_scale", kv.scale, (batch, heads, *scales), torch.float16, device)
            if kv.offset is not None:
                checks.operand(f"{name}_offset", kv.offset, (batch, heads, *scales), torch.float16, device)

    @property
    def tokens(self) -> int:
        """Tokens that attention sees, those of the pass included."""
        if self.before is not None:
            return self.tokens_before + self.new_tokens
        return (0 if self.quantized_keys is None else self.quantized_keys.tokens) + self.keys.shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """Codes, scale and offset of keys, then of values, offsets only if there are any; recent keys and values."""
        return [*self.quantized_keys.tensors, *self.quantized_values.tensors, self.keys, self.values]

    def quantized_before(self, tokens: int) -> int:
        """How many of the first tokens are codes once so many are there, in a cache of fixed size."""
        return max(tokens - self.residual_length, 0) // KV_BLOCK * KV_BLOCK

    def slots(self, start: int, stop: int) -> Tensor:
        """Where in the ring tokens ``start`` to ``stop`` lie, int64."""
        return torch.arange(start, stop, device=self.keys.device) % self.keys.shape[2]

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """All keys and all values (B, H, tokens, D), in the dtype of the recent ones."""
        old, keys, values = (self.quantized_keys, self.quantized_values), self.keys, self.values
        if self.before is not None:
            quantized = self.quantized_before(self.tokens_before)
            old = [kv.part(0, quantized) if quantized else None for kv in old]
            slots = self.slots(quantized, self.tokens)
            keys, values = keys[:, :, slots], values[:, :, slots]
        return _dequantized(old[0], keys), _dequantized(old[1], values)


def _dequantized(quantized: QuantizedKV | None, recent: Tensor) -> Tensor:
    if quantized is None:
        return recent
    batch, heads, n, head_dim = recent.shape
    out = recent.new_empty(batch, heads, quantized.tokens + n, head_dim)
    quantized.dequantize(out[:, :, : quantized.tokens])
    out[:, :, quantized.tokens :] = recent
    return out


def _words(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def _rows(x: Tensor, start: int, stop: int, tokens: int) -> Tensor:
    """The part of one of the tensors that belongs to some tokens: 64 of them may share a row."""
    per_row = tokens // x.shape[2]
    return x[:, :, start // per_row : stop // per_row]


def _split(x: Tensor, granularity: str, group_size: int) -> tuple[Tensor, int]:
    """``x`` with one more dimension, along which numbers share a scale, and which one that is."""
    return (x.unflatten(2, (-1, KV_BLOCK)), 3) if granularity == "channel" else (x.unflatten(3, (-1, group_size)), 4)


# float16 rounds by at most 2^−11 of a number: moved by 2^−10 first, it cannot end on the wrong side.
def _downward(x: Tensor) -> Tensor:
    return (x - x.abs() * 2**-10).half()


def _upward(x: Tensor) -> Tensor:
    return (x * (1 + 2**-10)).clamp(min=torch.finfo(torch.float16).smallest_normal).half()
