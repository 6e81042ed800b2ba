"""What numbers each precision can hold.

A format knows its bits, its largest value, its representable values, and how to turn a number (already divided by its
scale) into a code and back. Scales are `affine`'s business, but for those of blocks, which are part of their format.

Four kinds:

* `IntFormat`    evenly spaced integers, two's complement: INT2 to INT8
* `FloatFormat`  sign, exponent, mantissa: FP32, FP16, BF16, FP8 E4M3 and E5M2, FP4 E2M1
* `TableFormat`  any sorted list of values: NF4
* `BlockFormat`  a small float whose blocks share a scale that is itself a small float: MXFP4, NVFP4
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError, unknown

E4M3_LARGEST = 448.0
E8M0_BIAS = 127


@dataclass(frozen=True)
class Format:
    """What every format has. ``bits`` is the width of one code."""

    name: str
    bits: int

    @property
    def largest(self) -> float:
        """The largest magnitude a code can stand for: a scale maps a row's absmax onto it."""
        return float(self.values()[-1])

    def values(self) -> Tensor:
        """All distinct representable values, ascending, float64. For wide floats see `FloatFormat.values`."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """The nearest code of each value of ``x`` (float, already divided by its scale); out of range saturates."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 value of each code."""
        raise NotImplementedError

    def round(self, x: Tensor) -> Tensor:
        """The nearest representable value of each element, as float32: what survives a trip through the format."""
        return self.decode(self.encode(x))

    @property
    def default_granularity(self) -> str:
        """What shares a scale unless somebody says otherwise, as `Granularity.parse` reads it."""
        return "tensor"

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """The dtype of the scales that the format brings along; None where any float will do."""
        return None

    @property
    def has_global_scale(self) -> bool:
        """Whether one more number, for the whole tensor, divides all scales."""
        return False

    def global_scale(self, absmax: Tensor) -> Tensor | None:
        """That number, float32 (1,), for a tensor whose largest magnitude is ``absmax`` (float32, 0-d); else None."""
        return None

    def float_scale(self, scale: Tensor, global_scale: Tensor | None = None) -> Tensor:
        """The numbers that stored scales stand for, in a dtype that can be computed with; any shape."""
        return scale


@dataclass(frozen=True)
class IntFormat(Format):
    """Signed integers of ``bits`` bits: qmin = −2^(bits−1), qmax = 2^(bits−1) − 1. Codes are int8."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise CanopyError(f"integers of {self.bits} bits are not offered; use 2 to 8")

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def largest(self) -> float:
        return float(self.qmax)

    def values(self) -> Tensor:
        return torch.arange(self.qmin, self.qmax + 1, dtype=torch.float64)

    def encode(self, x: Tensor) -> Tensor:
        return x.round().clamp_(self.qmin, self.qmax).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)


@dataclass(frozen=True)
class FloatFormat(Format):
    """One sign bit, ``exponent_bits``, ``mantissa_bits``.

    A normal number is (−1)^sign · 2^(exponent − bias) · 1.mantissa; exponent 0 holds the subnormals. ``special`` says
    what the top exponent is spent on: ``"ieee"`` keeps all of it for infinity and NaN (FP32, FP16, BF16, E5M2),
    ``"nan"`` only the single all-ones code (E4M3, as in Micikevicius et al. 2022, "FP8 Formats for Deep Learning"),
    ``"none"`` nothing (E2M1, as in the OCP Microscaling specification 1.0).

    Codes are tensors of ``dtype`` where torch has one, else uint8 holding the bit pattern.
    """

    exponent_bits: int = 8
    mantissa_bits: int = 23
    special: str = "ieee"
    dtype: torch.dtype | None = None

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest(self) -> float:
        top = 2**self.exponent_bits - 1 - self.bias - (self.special == "ieee")
        below_two = 2 - 2.0**-self.mantissa_bits * (2 if self.special == "nan" else 1)
        return below_two * 2.0**top

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest positive value, a subnormal."""
        return self.smallest_normal * 2.0**-self.mantissa_bits

    def step(self, x: Tensor) -> Tensor:
        """The distance between neighbours at each value of ``x``, float64: it doubles with every power of two."""
        magnitude = x.double().abs().nan_to_num().clamp(self.smallest_normal, self.largest)
        exponent = torch.frexp(magnitude).exponent - 1  # frexp: magnitude = m · 2^exponent with m in [0.5, 1)
        return torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - self.mantissa_bits)

    def round(self, x: Tensor) -> Tensor:
        """Round to nearest, ties to even; beyond the largest value it saturates, NaN stays NaN."""
        step = self.step(x)
        return ((x.double() / step).round() * step).clamp(-self.largest, self.largest).to(torch.float32)

    def magnitudes(self) -> Tensor:
        """Every finite value ≥ 0 in order of its bit pattern, float64. Formats of at most 16 bits."""
        if self.bits > 16:
            raise ValueError(f"{self.name} has 2^{self.bits} codes, too many to list; use .step(x) or .round(x)")
        pattern = torch.arange(2 ** (self.bits - 1))
        exponent, mantissa = pattern >> self.mantissa_bits, pattern & (2**self.mantissa_bits - 1)
        normal = (exponent > 0).long()
        fraction = mantissa.double() * 2.0**-self.mantissa_bits + normal
        value = torch.ldexp(fraction, exponent.clamp(min=1) - self.bias)
        return value[value <= self.largest]

    def values(self) -> Tensor:
        positive = self.magnitudes()
        return torch.cat([-positive.flip(0)[:-1], positive])

    def encode(self, x: Tensor) -> Tensor:
        if self.dtype is not None:
            return x.clamp(-self.largest, self.largest).to(self.dtype)
        magnitudes = self.magnitudes().to(x.device)
        code = torch.searchsorted(magnitudes, self.round(x).double().abs().contiguous()).to(torch.uint8)
        return code | (torch.signbit(x).to(torch.uint8) << (self.bits - 1))

    def decode(self, codes: Tensor) -> Tensor:
        if codes.dtype == torch.float8_e4m3fn and codes.device.type == "cpu":
            values = e4m3_to_float(codes).mul_(256)
            return values.masked_fill_(values.abs() == 480, torch.nan)  # the one code that is no number
        if self.dtype is not None:
            return codes.to(torch.float32)
        finite = self.magnitudes().to(codes.device, torch.float32)
        positive = torch.nn.functional.pad(finite, (0, 2 ** (self.bits - 1) - len(finite)), value=torch.nan)
        return torch.cat([positive, -positive])[codes.long()]


@dataclass(frozen=True)
class TableFormat(Format):
    """A sorted table of 2^bits values in [−1, 1]; a code is an index (uint8)."""

    table: tuple[float, ...] = field(default=(), repr=False)

    @property
    def default_granularity(self) -> str:
        return "g64"

    def values(self) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float64)

    def encode(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        table = self.values().to(x.device)
        return torch.bucketize(x.contiguous(), ((table[1:] + table[:-1]) / 2).to(x.dtype)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return self.values().to(codes.device, torch.float32)[codes.long()]


@dataclass(frozen=True)
class BlockFormat(Format):
    """Small floats in blocks of ``block_size`` neighbours; each block's scale is stored in ``scale_format``.

    ``e8m0`` is a bare power of two in one byte (MXFP4: OCP Microscaling specification 1.0, section 5). ``fp8_e4m3`` is
    finer, and needs one more float32 number for the whole tensor, since E4M3 alone spans too little (NVFP4). As in
    compressed-tensors, that global scale is what stored scales are divided by.
    """

    element: FloatFormat = field(default=None)  # type: ignore[assignment]
    block_size: int = 32
    scale_format: str = "e8m0"

    @property
    def largest(self) -> float:
        return self.element.largest

    @property
    def has_global_scale(self) -> bool:
        return self.scale_format == "fp8_e4m3"

    def values(self) -> Tensor:
        return self.element.values()

    def encode(self, x: Tensor) -> Tensor:
        return self.element.encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        return self.element.decode(codes)

    @property
    def default_granularity(self) -> str:
        return f"g{self.block_size}"

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.has_global_scale else torch.uint8

    def global_scale(self, absmax: Tensor) -> Tensor | None:
        """NVFP4: what stored scales are divided by: multiplied with it, the tensor's absmax becomes the largest
        element times the largest E4M3."""
        if not self.has_global_scale:
            return None
        scale = self.largest * E4M3_LARGEST / absmax
        return torch.where(absmax == 0, 1.0, scale).clamp(max=torch.finfo(torch.float32).max).reshape(1)

    def block_scale(self, absmax: Tensor, global_scale: Tensor | None = None) -> Tensor:
        """The scale of blocks whose largest magnitudes are ``absmax`` (float32, any shape), as it is stored: E8M0
        exponents with their bias (uint8), or E4M3 after a multiplication by ``global_scale``."""
        if self.has_global_scale:
            scale = absmax / absmax.new_tensor(self.largest) * global_scale
            return scale.clamp(2.0**-9, E4M3_LARGEST).to(torch.float8_e4m3fn)
        # OCP MX 1.0, section 6.3: the power of two that puts absmax's exponent on the element's largest exponent.
        _, exponent = torch.frexp(absmax)
        top = int(torch.frexp(torch.tensor(self.largest)).exponent)
        return (torch.where(absmax > 0, exponent - top, 0).clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS).to(torch.uint8)

    def float_scale(self, scale: Tensor, global_scale: Tensor | None = None) -> Tensor:
        if self.has_global_scale:
            return scale.to(torch.float32) / global_scale
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - E8M0_BIAS)


# The 16 quantiles of a normal distribution that QLoRA calls NormalFloat (Dettmers et al. 2023, appendix E).
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_E2M1 = FloatFormat("fp4_e2m1", 4, 2, 1, "none")

FORMATS: dict[str, Format] = {
    f.name: f
    for f in [
        FloatFormat("fp32", 32, 8, 23, "ieee", torch.float32),
        FloatFormat("fp16", 16, 5, 10, "ieee", torch.float16),
        FloatFormat("bf16", 16, 8, 7, "ieee", torch.bfloat16),
        FloatFormat("fp8_e4m3", 8, 4, 3, "nan", torch.float8_e4m3fn),
        FloatFormat("fp8_e5m2", 8, 5, 2, "ieee", torch.float8_e5m2),
        *[IntFormat(f"int{bits}", bits) for bits in range(8, 1, -1)],
        _E2M1,
        TableFormat("nf4", 4, NF4_TABLE),
        BlockFormat("mxfp4", 4, _E2M1, 32, "e8m0"),
        BlockFormat("nvfp4", 4, _E2M1, 16, "fp8_e4m3"),
    ]
}
ALIASES = {"fp8": "fp8_e4m3", "e4m3": "fp8_e4m3", "e5m2": "fp8_e5m2", "fp4": "fp4_e2m1", "e2m1": "fp4_e2m1"}


def get_format(name: str | Format) -> Format:
    """The format called ``name`` (any case, ``-`` or ``_``; ``fp8`` means E4M3).

    Raises `CanopyError` with the nearest names for one that does not exist.
    """
    if isinstance(name, Format):
        return name
    key = str(name).lower().replace("-", "_")
    try:
        return FORMATS[ALIASES.get(key, key)]
    except KeyError:
        raise unknown("format", name, FORMATS) from None


def e4m3_to_float(codes: Tensor) -> Tensor:
    """What finite E4M3 codes stand for, divided by 256, as float32.

    E4M3 and float16 differ in the bias of the exponent (7 and 15) and the length of the mantissa, so the bits only need
    to move. On a CPU that is ten times faster than torch's cast.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)  # a copy of the sign fills the upper byte
    return bits.bitwise_and_(0xBF80 - 2**16).view(torch.float16).float()


KV_BLOCK = 64  # tokens of a cache that are quantized together, and whose key channels share a scale
KV_GROUP_SIZE = 64  # channels of one token that share a scale
KV_RESIDUAL_LENGTH = 32  # newest tokens that stay in full precision, besides those of a block that is not full


def kv_group_size(head_dim: int, group_size: int | None = None) -> int:
    """How many channels of one token of a head share a scale: so many, or the largest number up to 64 that divides it.

    Raises `CanopyError` for a number that does not divide it.
    """
    fits = next(size for size in range(min(KV_GROUP_SIZE, head_dim), 0, -1) if head_dim % size == 0)
    if group_size is not None and head_dim % group_size:
        raise CanopyError(
            f"groups of {group_size} channels do not divide heads of {head_dim}; use one that does, such as "
            f"group_size={fits}"
        )
    return fits if group_size is None else group_size


@dataclass(frozen=True)
class CacheFormat:
    """What a cached key or value is rounded to: unsigned integers of ``bits`` bits, or E4M3."""

    name: str
    bits: int
    is_float: bool = False

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the tensor that holds the codes, several to a byte if they are shorter."""
        return torch.float8_e4m3fn if self.is_float else torch.uint8


CACHE_FORMATS = {f.name: f for f in (*(CacheFormat(f"kv{b}", b) for b in (8, 4, 2)), CacheFormat("kv-fp8", 8, True))}


def get_cache_format(name: str | CacheFormat) -> CacheFormat:
    """The format called ``name``: kv8, kv4, kv2 or kv-fp8. Raises `CanopyError` for one that does not exist."""
    if isinstance(name, CacheFormat):
        return name
    return CACHE_FORMATS[checks.choice("KV cache", name.lower() if isinstance(name, str) else name, CACHE_FORMATS)]
