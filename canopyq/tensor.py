"""`quantize(x, …)` and what it returns: a `QuantizedTensor` of packed codes, scales and zero points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from canopyq import affine, checks, packing
from canopyq.errors import CanopyError
from canopyq.formats import BlockFormat, Format, IntFormat
from canopyq.granularity import Granularity
from canopyq.observers import get_observer
from canopyq.scheme import Scheme

CHUNK = 2**19  # values quantized at a time: a chunk and its codes stay in the processor's cache


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor held as codes.

    Attributes:
        data: what is stored: int32 words for codes under 8 bits (see `packing`), int8, or a float8/16/32 tensor.
        scale: None for plain casts, else (1,), (N, 1), (…, 1) or (…, groups); E8M0 exponents (uint8) for MXFP4, E4M3
            for NVFP4.
        zero_point: int8 in the shape of ``scale``, or None when symmetric.
        tensor_scale: NVFP4's second, float32 scale (1,), else None.
        scheme: how the codes came about.
        shape, dtype: of the original tensor.
    """

    data: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    scheme: Scheme
    shape: torch.Size
    dtype: torch.dtype
    tensor_scale: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """One code per value in the original shape: int8 for integers, uint8 for 4-bit floats and tables."""
        if not _is_packed(self.scheme.format):
            return self.data.reshape(self.shape)
        signed = isinstance(self.scheme.format, IntFormat)
        n = self.shape[-1] if self.shape else 1
        return packing.unpack(self.data, self.scheme.format.bits, n, signed=signed).reshape(self.shape)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that are really stored, by name."""
        named = {
            "data": self.data,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "tensor_scale": self.tensor_scale,
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

    def step(self) -> Tensor:
        """The float32 scale of every stored scale, whatever it is stored as."""
        if self.scale is None:
            raise CanopyError(f"{self.scheme.format.name} is a plain cast and has no scale")
        if self.scale.dtype == torch.uint8:  # E8M0: a bare exponent
            return torch.ldexp(torch.ones_like(self.scale, dtype=torch.float32), self.scale.int() - 127)
        step = self.scale.to(torch.float32)
        return step if self.tensor_scale is None else step * self.tensor_scale

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The real values that the codes stand for, in ``dtype`` (default: the original one)."""
        dtype = self.dtype if dtype is None else dtype
        if self.scale is None:
            return affine.dequantize(
                self.data, torch.ones((), device=self.data.device), None, self.scheme.format, dtype
            )
        granularity, shape = self.scheme.granularity, self.shape or torch.Size([1])
        zero_point = None if self.zero_point is None else self.zero_point.reshape(-1, 1)
        rows = affine.dequantize(
            granularity.rows(self.codes.reshape(shape)),
            self.step().reshape(-1, 1),
            zero_point,
            self.scheme.format,
            dtype,
        )
        return granularity.from_rows(rows, shape).reshape(self.shape)

    def with_codes(
        self, codes: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> QuantizedTensor:
        """The same shape and scheme with other codes (in the original shape), and on other scales and zero points if
        they are given: one for each of the present ones, in their order."""
        changed = {"data": _pack_codes(codes, self.scheme.format)}
        if scale is not None:
            changed["scale"] = scale.reshape(self.scale.shape).to(self.scale.dtype)
        if zero_point is not None:
            changed["zero_point"] = zero_point.reshape(self.scale.shape)
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        return replace(self, **{name: part.to(device) for name, part in self.parts.items()})

    def __repr__(self) -> str:
        return f"QuantizedTensor({tuple(self.shape)}, {self.scheme}, {self.bits_per_value:.3g} bits per value)"


def quantize(
    x: Tensor,
    format: str | Format | Scheme = "int8",
    granularity: str | Granularity | None = None,
    *,
    symmetric: bool = True,
    restricted: bool = False,
    observer: str = "minmax",
    scale_dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    """Quantize a tensor. The arguments are those of `Scheme`, which may also be given whole in the place of ``format``.

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
    with torch.no_grad():
        source = x.detach().reshape(1) if x.dim() == 0 else x.detach()
        if scheme.is_plain_cast:
            return QuantizedTensor(_plain_cast(source, scheme).reshape(x.shape), None, None, scheme, x.shape, x.dtype)
        _check_fit(source.shape, scheme)
        if scheme.observer != "minmax":  # the others may look past a NaN
            raise_not_finite(source)
        if scheme.scale_dtype is None and not isinstance(scheme.format, BlockFormat):
            narrow = x.dtype in (torch.float16, torch.bfloat16)
            scheme = replace(scheme, scale_dtype=x.dtype if narrow else torch.float32)
        tensor_scale = _tensor_scale(source, scheme.format)
        chunks = [_quantize_chunk(chunk, scheme, tensor_scale, source) for chunk in _chunks(source, scheme.granularity)]
        data, scale, zero_point = (None if part[0] is None else torch.cat(part) for part in zip(*chunks, strict=True))
    return QuantizedTensor(data, scale, zero_point, scheme, x.shape, x.dtype, tensor_scale)


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
    _check_fit(shape, scheme)
    columns = shape[-1]
    parts = {"data": count // columns * 4 * -(-columns * fmt.bits // 32) if _is_packed(fmt) else count}
    scales = torch.Size(scheme.granularity.scale_shape(shape)).numel()
    if isinstance(fmt, BlockFormat):
        return parts | {"scale": scales} | ({"tensor_scale": 4} if fmt.has_tensor_scale else {})
    narrow = dtype in (torch.float16, torch.bfloat16)
    kept = scheme.scale_dtype or (dtype if narrow else torch.float32)
    return parts | {"scale": scales * kept.itemsize} | ({} if scheme.symmetric else {"zero_point": scales})


def _check_fit(shape: torch.Size, scheme: Scheme) -> None:
    fmt = scheme.format
    if isinstance(fmt, BlockFormat) and fmt.block_size > shape[-1]:
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


def _plain_cast(x: Tensor, scheme: Scheme) -> Tensor:
    raise_not_finite(x)
    cast = x.to(scheme.format.dtype)
    if not bool(cast.isfinite().all()):
        raise CanopyError(
            f"{scheme.format.name} ends at {scheme.format.largest:.5g} and the tensor reaches "
            f"{x.abs().max().item():.5g}; use bf16 or fp32"
        )
    return cast.clone() if cast is x else cast


def _chunks(x: Tensor, granularity: Granularity) -> Iterator[Tensor]:
    """Slices of the first dimension that cut no row of `Granularity.rows` in two."""
    sliceable = granularity.kind in ("group", "token") or (granularity.kind == "channel" and granularity.axis == 0)
    if not sliceable or x.dim() < 2:
        return iter([x])
    return iter(x.split(max(1, CHUNK * x.shape[0] // x.numel())))


def _quantize_chunk(
    x: Tensor, scheme: Scheme, tensor_scale: Tensor | None, whole: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed codes, scale and zero point of one chunk of the ``whole``: all of the method in ten lines."""
    fmt, granularity = scheme.format, scheme.granularity
    rows = granularity.rows(x.to(torch.promote_types(x.dtype, torch.float32)))
    if scheme.observer in ("percentile", "entropy") and granularity.padding(x.shape):
        raise CanopyError(
            f"{scheme.observer} ranges need whole groups: {granularity} does not divide {x.shape[-1]} values; "
            "use observer='minmax' or 'mse', or a group size that does"
        )
    lo, hi = get_observer(scheme.observer)(rows, fmt, symmetric=scheme.symmetric, restricted=scheme.restricted)
    _finite(whole, lo, hi)
    zero_point = None
    if isinstance(fmt, BlockFormat):
        scale, step = _block_scale(hi, fmt, tensor_scale)
    else:
        scale, zero_point = affine.scale_and_zero_point(
            lo, hi, fmt, symmetric=scheme.symmetric, restricted=scheme.restricted, scale_dtype=scheme.scale_dtype
        )
        step = scale
    codes = granularity.from_rows(affine.quantize(rows, step, zero_point, fmt, restricted=scheme.restricted), x.shape)
    shape = granularity.scale_shape(x.shape)
    return _pack_codes(codes, fmt), scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)


def _pack_codes(codes: Tensor, fmt: Format) -> Tensor:
    """Codes as `QuantizedTensor.data` holds them: under 8 bits in int32 words along the last dimension."""
    if _is_packed(fmt):
        codes = packing.pack_unchecked(codes, fmt.bits, -fmt.qmin if isinstance(fmt, IntFormat) else 0)
    return codes.contiguous()


def _is_packed(fmt: Format) -> bool:
    return fmt.bits < 8


def _tensor_scale(x: Tensor, fmt: Format) -> Tensor | None:
    """NVFP4: the scale of the scales. It maps the tensor's absmax onto the largest element times the largest E4M3."""
    if not (isinstance(fmt, BlockFormat) and fmt.has_tensor_scale):
        return None
    absmax = x.abs().amax().to(torch.float32)
    _finite(x, absmax, absmax)
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(absmax == 0, 1.0, absmax / absmax.new_tensor(fmt.largest * 448.0)).clamp(min=tiny).reshape(1)


def _block_scale(absmax: Tensor, fmt: BlockFormat, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """A block's scale as it is stored, and the float32 step that it means."""
    if tensor_scale is None:
        # OCP MX 1.0, section 6.3: the power of two that puts absmax's exponent on the element's largest exponent.
        _, exponent = torch.frexp(absmax)
        top = int(torch.frexp(torch.tensor(fmt.largest)).exponent)
        stored = torch.where(absmax > 0, exponent - top, 0).clamp(-127, 127)
        return (stored + 127).to(torch.uint8), torch.ldexp(torch.ones_like(absmax), stored)
    stored = (absmax / absmax.new_tensor(fmt.largest) / tensor_scale).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
    return stored, stored.to(torch.float32) * tensor_scale
