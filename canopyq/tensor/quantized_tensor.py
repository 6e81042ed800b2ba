"""`quantize(x, …)` and what it returns: a `QuantizedTensor` of packed codes, scales and zero points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError, shown
from canopyq.tensor import packing
from canopyq.tensor.formats import Format, IntFormat
from canopyq.tensor.granularity import Granularity
from canopyq.tensor.observers import find_range
from canopyq.tensor.scheme import Scheme

CHUNK = 2**19  # values quantized at a time: a chunk and its codes stay in the processor's cache


@dataclass(frozen=True, eq=False)
class UnpackedTensor:
    """A tensor as codes of one element each: what rounding methods work on, and `pack` once they are done.

    Attributes:
        codes: in the original shape: int8 for integers, uint8 for 4-bit floats and tables, else the format's own dtype.
        scale, zero_point, global_scale: as `QuantizedTensor` has them.
        scheme: how the codes came about.
        dtype: of the original tensor.
    """

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    scheme: Scheme
    dtype: torch.dtype
    global_scale: Tensor | None = None

    def pack(self) -> QuantizedTensor:
        """The same with codes under 8 bits in int32 words along the last dimension."""
        data, fmt = self.codes, self.scheme.format
        if _is_packed(fmt):
            data = packing.pack_unchecked(data, fmt.bits, -fmt.qmin if isinstance(fmt, IntFormat) else 0)
        return QuantizedTensor(
            data.contiguous(), self.scale, self.zero_point, self.scheme, self.codes.shape, self.dtype, self.global_scale
        )

    def float_scale(self) -> Tensor:
        """The float32 number of every stored scale, in its shape, whatever it is stored as."""
        return _float_scale(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The real values that the codes stand for, in ``dtype`` (default: the original one)."""
        granularity, shape = self.scheme.granularity, self.codes.shape or torch.Size([1])
        dtype = self.dtype if dtype is None else dtype
        scale, zero_point = (x if x is None else x.reshape(-1, 1) for x in (self.scale, self.zero_point))
        rows = granularity.rows(self.codes.reshape(shape))
        values = self.scheme.dequantize_rows(rows, scale, zero_point, self.global_scale, dtype)
        return granularity.from_rows(values, shape).reshape(self.codes.shape)

    def with_scale(self, scale: Tensor) -> UnpackedTensor:
        """The same codes on other scales: one number, any float dtype, for each of the present ones, in their order."""
        return replace(self, scale=scale.reshape(self.scale.shape).to(self.scale.dtype))


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor held as codes.

    Attributes:
        data: what is stored: int32 words for codes under 8 bits (see `packing`), int8, or a float8/16/32 tensor.
        scale: None for plain casts, else (1,), (N, 1), (…, 1) or (…, groups); E8M0 exponents (uint8) for MXFP4, E4M3
            for NVFP4.
        zero_point: int8 in the shape of ``scale``, or None when symmetric.
        global_scale: NVFP4's float32 number (1,) that all scales are divided by, else None.
        scheme: how the codes came about.
        shape, dtype: of the original tensor.
    """

    data: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    scheme: Scheme
    shape: torch.Size
    dtype: torch.dtype
    global_scale: Tensor | None = None

    def unpack(self) -> UnpackedTensor:
        """The inverse of `UnpackedTensor.pack`; codes of 8 bits and more share memory."""
        fmt, codes = self.scheme.format, self.data
        if _is_packed(fmt):
            n = self.shape[-1] if self.shape else 1
            codes = packing.unpack(codes, fmt.bits, n, signed=isinstance(fmt, IntFormat))
        return UnpackedTensor(
            codes.reshape(self.shape), self.scale, self.zero_point, self.scheme, self.dtype, self.global_scale
        )

    @property
    def codes(self) -> Tensor:
        """One code per value in the original shape: int8 for integers, uint8 for 4-bit floats and tables."""
        return self.unpack().codes

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that are really stored, by name."""
        named = {
            "data": self.data,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "global_scale": self.global_scale,
        }
        return {name: part for name, part in named.items() if part is not None}

    @property
    def nbytes(self) -> int:
        """Bytes held, counted from the tensors' storage."""
        return sum(part.untyped_storage().nbytes() for part in self.parts.values())

    @property
    def bits_per_value(self) -> float:
        """Bits held per original value, scales and zero points included."""
        return 8 * self.nbytes / self.shape.numel()

    def float_scale(self) -> Tensor:
        """The float32 number of every stored scale, in its shape, whatever it is stored as."""
        return _float_scale(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The real values that the codes stand for, in ``dtype`` (default: the original one)."""
        return self.unpack().dequantize(dtype)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        return replace(self, **{name: part.to(device) for name, part in self.parts.items()})

    def __repr__(self) -> str:
        return f"QuantizedTensor({tuple(self.shape)}, {self.scheme}, {self.bits_per_value:.3g} bits per value)"


def _float_scale(x: UnpackedTensor | QuantizedTensor) -> Tensor:
    if x.scale is None:
        raise CanopyError(f"{x.scheme.format.name} is a plain cast and has no scale")
    return x.scheme.format.float_scale(x.scale, x.global_scale).to(torch.float32)


def quantize(
    x: Tensor,
    format: str | Format | Scheme = "int8",
    granularity: str | Granularity | None = None,
    *,
    symmetric: bool = True,
    restricted: bool = False,
    observer: str = "minmax",
    scale_dtype: torch.dtype | None = None,
    global_scale: Tensor | None = None,
) -> QuantizedTensor:
    """Quantize a tensor. The arguments are those of `Scheme`, which may also be given whole in the place of ``format``.

    NVFP4 takes its ``global_scale``, float32 (1,), from the largest magnitude of ``x``, unless one is given that
    several tensors have in common (see `global_scale_of`).

    >>> q = quantize(torch.randn(512, 1024), "int4", "g128")
    >>> q.codes.shape, q.scale.shape, q.bits_per_value
    (torch.Size([512, 1024]), torch.Size([512, 8]), 4.25)

    Raises:
        CanopyError: for NaN or infinity, an empty or integer tensor, a group size that does not fit, unknown names,
            combinations without sense. Nothing is changed then.
    """
    if not isinstance(format, Scheme):
        scheme = Scheme(format, granularity, symmetric, restricted, observer, scale_dtype)
    elif (granularity, symmetric, restricted, observer, scale_dtype) == (None, True, False, "minmax", None):
        scheme = format
    else:
        raise CanopyError(
            f"the scheme '{format}' decides everything; leave the other arguments out, or change the scheme"
        )
    checks.tensor("x", x)
    if global_scale is not None:
        _check_global_scale(global_scale, scheme)
    with torch.no_grad():
        source = x.detach().reshape(1) if x.dim() == 0 else x.detach()
        if scheme.is_plain_cast:
            return replace(_plain_cast(source, scheme).pack(), shape=x.shape)
        chunks = [chunk.pack() for chunk in _quantize_chunks(source, scheme, global_scale)]
    data, scale, zero_point = (
        _cat([getattr(chunk, name) for chunk in chunks]) for name in ("data", "scale", "zero_point")
    )
    return replace(chunks[0], data=data, scale=scale, zero_point=zero_point, shape=x.shape)


@torch.no_grad()
def quantize_unpacked(x: Tensor, scheme: Scheme, global_scale: Tensor | None = None) -> UnpackedTensor:
    """`quantize` without packing, for what goes on to work with the codes.

    Args:
        global_scale: of a format that has one (1,), such as `global_scale_of` gives for several weights. None takes
            that of ``x`` alone.

    Raises:
        CanopyError: as `quantize`.
    """
    checks.tensor("x", x)
    if scheme.is_plain_cast:
        return _plain_cast(x.detach(), scheme)
    chunks = list(_quantize_chunks(x.detach(), scheme, global_scale))
    codes, scale, zero_point = (
        _cat([getattr(chunk, name) for chunk in chunks]) for name in ("codes", "scale", "zero_point")
    )
    return replace(chunks[0], codes=codes, scale=scale, zero_point=zero_point)


def global_scale_of(weights: Iterable[Tensor], scheme: Scheme) -> Tensor | None:
    """The global scale (1,) that weights have in common, by the largest magnitude of all; None for a format that has
    none. Servers that compute several layers as one keep a single global scale for them.

    Raises:
        CanopyError: for NaN or infinity.
    """
    if not scheme.format.has_global_scale:
        return None
    return scheme.format.global_scale(torch.stack([_absmax(weight) for weight in weights]).amax())


def _check_global_scale(global_scale: Tensor, scheme: Scheme) -> None:
    if not scheme.format.has_global_scale:
        raise CanopyError(f"{scheme.format.name} has no global scale; leave global_scale out")
    fits = isinstance(global_scale, Tensor) and (global_scale.dtype, global_scale.shape) == (torch.float32, (1,))
    if not fits or not 0 < float(global_scale) < float("inf"):
        raise CanopyError(f"global_scale is {shown(global_scale)}; give a positive float32 number of shape (1,)")


def _absmax(x: Tensor) -> Tensor:
    absmax = x.abs().amax().to(torch.float32)
    _finite(x, absmax, absmax)
    return absmax


def quantized_bytes(shape: torch.Size, scheme: Scheme, dtype: torch.dtype) -> int:
    """What ``quantize(x, scheme).nbytes`` will be for an x of this shape and dtype, without one.

    Raises:
        CanopyError: if the scheme does not fit the shape.
    """
    return sum(part_bytes(shape, scheme, dtype).values())


def part_bytes(shape: torch.Size, scheme: Scheme, dtype: torch.dtype) -> dict[str, int]:
    """The bytes that each of ``quantize(x, scheme).parts`` will hold, by name.

    Raises:
        CanopyError: if the scheme does not fit the shape.
    """
    fmt, count = scheme.format, shape.numel()
    if scheme.is_plain_cast:
        return {"data": count * fmt.bits // 8}
    check_fit(shape, scheme)
    columns = shape[-1]
    parts = {"data": count // columns * 4 * -(-columns * fmt.bits // 32) if _is_packed(fmt) else count}
    scales = torch.Size(scheme.granularity.scale_shape(shape)).numel()
    parts["scale"] = scales * scheme.stored_scale_dtype(dtype).itemsize
    if fmt.has_global_scale:
        parts["global_scale"] = torch.float32.itemsize
    if not scheme.symmetric:
        parts["zero_point"] = scales
    return parts


def sqnr_db(original: Tensor, restored: Tensor) -> float:
    """Signal to quantization noise, 10 · log10(Σ w² / Σ (w − ŵ)²), in dB: 6 dB more is one bit better."""
    signal = original.double().square().sum()
    noise = (original.double() - restored.double()).square().sum()
    return float(10 * torch.log10(signal / noise)) if noise > 0 else float("inf")


def check_fit(shape: torch.Size, scheme: Scheme) -> None:
    fmt = scheme.format
    if fmt.scale_dtype is not None and fmt.block_size > shape[-1]:
        raise CanopyError(
            f"{fmt.name} takes blocks of {fmt.block_size} values and the last dimension of {tuple(shape)} has "
            f"{shape[-1]}; use int4 or nf4 with g{shape[-1]} or smaller"
        )
    scheme.granularity.check(shape)


def _finite(x: Tensor, lo: Tensor, hi: Tensor) -> None:
    """Raise if a range end is not finite: min and max carry every NaN and infinity along, so they tell of all."""
    if bool((lo.float().isfinite() & hi.float().isfinite()).all()):
        return
    raise_not_finite(x)
    raise CanopyError(f"the tensor reaches {x.abs().max().item():.3g}, beyond float32; divide it by a constant first")


def raise_not_finite(x: Tensor) -> None:
    """Raise `CanopyError` that counts the NaN and infinite values of ``x``; return if there are none."""
    bad = ~x.isfinite()
    count = int(bad.sum())
    if count:
        nans = int(x.isnan().sum())
        raise CanopyError(
            f"the tensor of shape {tuple(x.shape)} holds {nans} NaN and {count - nans} infinite values; "
            "find where they come from, or use torch.nan_to_num(x)"
        )


def _plain_cast(x: Tensor, scheme: Scheme) -> UnpackedTensor:
    raise_not_finite(x)
    cast = x.to(scheme.format.dtype, copy=True)
    if not bool(cast.isfinite().all()):
        raise CanopyError(
            f"{scheme.format.name} ends at {scheme.format.largest:.5g} and the tensor reaches "
            f"{x.abs().max().item():.5g}; use bf16 or fp32"
        )
    return UnpackedTensor(cast, None, None, scheme, x.dtype)


def _quantize_chunks(x: Tensor, scheme: Scheme, global_scale: Tensor | None = None) -> Iterator[UnpackedTensor]:
    """The codes of ``x`` in slices of its first dimension."""
    check_fit(x.shape, scheme)
    if scheme.observer != "minmax":  # the others may look past a NaN
        raise_not_finite(x)
    if global_scale is None:
        global_scale = global_scale_of([x], scheme)
    if scheme.format.scale_dtype is None:
        scheme = replace(scheme, scale_dtype=scheme.stored_scale_dtype(x.dtype))
    for chunk in _chunks(x, scheme.granularity):
        yield _quantize_chunk(chunk, scheme, global_scale, x)


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


def _chunks(x: Tensor, granularity: Granularity) -> Iterator[Tensor]:
    """Slices of the first dimension that cut no row of `Granularity.rows` in two."""
    sliceable = granularity.kind in ("group", "token") or (granularity.kind == "channel" and granularity.axis == 0)
    if not sliceable or x.dim() < 2:
        return iter([x])
    return iter(x.split(max(1, CHUNK * x.shape[0] // x.numel())))


def _quantize_chunk(x: Tensor, scheme: Scheme, global_scale: Tensor | None, whole: Tensor) -> UnpackedTensor:
    """One chunk of the ``whole``: all of the method in ten lines."""
    granularity = scheme.granularity
    rows = granularity.rows(x.to(torch.promote_types(x.dtype, torch.float32)))
    if scheme.observer in ("percentile", "entropy") and granularity.padding(x.shape):
        raise CanopyError(
            f"{scheme.observer} ranges need whole groups: {granularity} does not divide {x.shape[-1]} values; "
            "use observer='minmax' or 'mse', or a group size that does"
        )
    lo, hi = find_range(rows, scheme)
    _finite(whole, lo, hi)
    scale, zero_point = scheme.scale_and_zero_point(lo, hi, global_scale)
    codes = granularity.from_rows(scheme.quantize_rows(rows, scale, zero_point, global_scale), x.shape)
    shape = granularity.scale_shape(x.shape)
    zero_point = None if zero_point is None else zero_point.reshape(shape)
    return UnpackedTensor(codes, scale.reshape(shape), zero_point, scheme, whole.dtype, global_scale)


def _is_packed(fmt: Format) -> bool:
    return fmt.bits < 8
