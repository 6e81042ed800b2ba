"""One quantized weight as compressed-tensors lays it out on disk, and back. Pure functions on tensors.

For a weight (N, K) with G groups, by the format of its group in the config:

| format | tensors |
|---|---|
| ``pack-quantized`` | ``weight_packed`` int32 (N, ⌈K·bits/32⌉), ``weight_scale``, ``weight_shape`` int64 [N, K] |
| ``int-quantized`` | ``weight`` int8 (N, K), ``weight_scale`` |
| ``float-quantized`` | ``weight`` float8_e4m3fn (N, K), ``weight_scale`` |
| ``nvfp4-pack-quantized`` | ``weight_packed`` uint8 (N, K/2), ``weight_scale`` E4M3, ``weight_global_scale`` (1,) |
| ``mxfp4-pack-quantized`` | ``weight_packed`` uint8 (N, K/2), ``weight_scale`` uint8 |

Of two FP4 codes in a byte the first is in the low half. NVFP4's scales are divided by ``weight_global_scale``, float32;
MXFP4's are exponents of two, with 127 added.

A scale is (N, G) for groups, (N, 1) per channel, (1,) per tensor. An asymmetric weight has ``weight_zero_point`` too:
int8 in the shape of the scale, which ``pack-quantized`` packs along N, into (⌈N·bits/32⌉, G). A layer whose inputs have
a static range has ``input_scale`` (1,) beside them, and if that is asymmetric ``input_zero_point`` (1,) int8; one with
NVFP4 inputs has ``input_global_scale`` (1,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from canopyq.errors import CanopyError
from canopyq.tensor import packing
from canopyq.tensor.formats import FloatFormat, IntFormat
from canopyq.tensor.quantized_tensor import QuantizedTensor
from canopyq.tensor.scheme import Scheme

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
BLOCKS = {"nvfp4": NVFP4, "mxfp4": MXFP4}
DISK_FORMATS = (PACKED, INT, FLOAT, NVFP4, MXFP4)
E8M0_NAN = 255
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def disk_format(weights: Scheme, activations: Scheme | None = None) -> str:
    """The compressed-tensors format that holds weights of this scheme.

    Raises:
        CanopyError: for what the format cannot hold, with the reason.
    """
    fmt, granularity = weights.format, weights.granularity
    if weights.is_plain_cast:
        raise CanopyError(f"{fmt.name} is a plain cast, not a quantized weight; save the model with save_pretrained")
    if fmt.name in BLOCKS:
        if activations is not None and activations.format != fmt:
            raise CanopyError(f"{fmt.name} weights have {fmt.name} inputs or none quantized, not {activations}")
        return BLOCKS[fmt.name]
    if fmt.name == "fp8_e5m2":
        raise CanopyError("compressed-tensors has no E5M2: an 8-bit float is always E4M3 there; use fp8_e4m3")
    if not isinstance(fmt, IntFormat) and fmt.name != "fp8_e4m3":
        raise CanopyError(f"compressed-tensors has no {fmt.name}; use int4, int8 or fp8_e4m3")
    if granularity.kind not in ("tensor", "channel", "group") or granularity.axis != 0:
        raise CanopyError(f"compressed-tensors has no weights with a scale per {granularity}; use 'channel' or 'g128'")
    if isinstance(fmt, FloatFormat):
        return FLOAT
    if fmt.bits == 8 and activations is not None:
        if activations.format != fmt:
            raise CanopyError(f"compressed-tensors has no int8 weights with {activations.format.name} activations")
        return INT
    return PACKED


def expected(
    scheme: Scheme, shape: tuple[int, int], format: str, inputs: Scheme | None = None
) -> dict[str, tuple[tuple[torch.dtype, ...], tuple]]:
    """What a weight (N, K) is on disk, and the static range of the layer's ``inputs`` if it has one: name after the
    module's -> the dtypes allowed, the shape.

    Raises:
        CanopyError: for a row so short that its shape does not tell how 3, 5, 6 or 7 bits are packed: since 0.18
            compressed-tensors lets codes go over from word to word; before, it left the rest of a word empty. And for a
            row that blocks of FP4 leave a rest of.
    """
    n, k = shape
    fmt, bits = scheme.format, scheme.format.bits
    scale = scheme.granularity.scale_shape(shape)
    if format in (NVFP4, MXFP4):
        if k % fmt.block_size:
            raise CanopyError(
                f"blocks of {fmt.block_size} leave a rest in {k} inputs, which no file holds; keep this layer by the "
                "recipe's ignore list (--ignore)"
            )
        tensors = {"weight_packed": ((torch.uint8,), (n, k // 2)), "weight_scale": ((fmt.scale_dtype,), scale)}
        names = ["weight_global_scale", *(["input_global_scale"] if inputs is not None else [])]
        return tensors | (dict.fromkeys(names, ((torch.float32,), (1,))) if fmt.has_global_scale else {})
    if format == PACKED:
        _refuse_ambiguous(bits, k)
        tensors = {"weight_packed": ((torch.int32,), (n, math.ceil(k * bits / 32))),
                   "weight_shape": ((torch.int64,), (2,))}  # fmt: skip
    else:
        tensors = {"weight": ((torch.float8_e4m3fn if format == FLOAT else torch.int8,), (n, k))}
    tensors["weight_scale"] = (SCALE_DTYPES, scale)
    if not scheme.symmetric:
        packed = _packs_zero_point(scheme, format)
        tensors["weight_zero_point"] = (
            ((torch.int32,), (math.ceil(n * bits / 32), scale[1])) if packed else ((torch.int8,), scale)
        )
    if inputs is not None:
        tensors["input_scale"] = (SCALE_DTYPES, (1,))
        if not inputs.symmetric:
            tensors["input_zero_point"] = ((torch.int8,), (1,))
    return tensors


def _refuse_ambiguous(bits: int, k: int) -> None:
    if 32 % bits and (words := math.ceil(k * bits / 32)) == math.ceil(k / (32 // bits)):
        raise CanopyError(
            f"{k} codes of {bits} bits fill {words} words as compressed-tensors before 0.18 packs them, and as it does "
            "since: no file says which; use 2, 4 or 8 bits"
        )


def input_to_disk(
    scale: Tensor, zero_point: Tensor | None, scheme: Scheme, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors that are written for a static range of inputs in ``scheme``; a scale in ``dtype`` where that changes
    nothing."""
    if scheme.format.has_global_scale:
        return {"input_global_scale": scale}
    tensors = {"input_scale": _exact(scale, dtype)}
    return tensors if zero_point is None else tensors | {"input_zero_point": zero_point}


def input_from_disk(tensors: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The inverse of `input_to_disk`, from the tensors of a layer.

    Raises:
        CanopyError: for a scale that is not finite and positive, a zero point outside the codes.
    """
    if scheme.format.has_global_scale:
        _raise_bad_scale(tensors["input_global_scale"], "input_global_scale")
        return tensors["input_global_scale"], None
    _raise_bad_scale(tensors["input_scale"], "input_scale")
    _raise_too_large(tensors["input_scale"], "input_scale", scheme, dtype)
    zero_point = tensors.get("input_zero_point")
    if zero_point is not None:
        _raise_bad_zero_point(zero_point, "input_zero_point", scheme)
    return tensors["input_scale"], zero_point


def to_disk(weight: QuantizedTensor, dtype: torch.dtype | None = None, format: str | None = None) -> dict[str, Tensor]:
    """The tensors that are written for a weight (N, K), by the name that follows the module's.

    Args:
        dtype: of the scales, usually that of the unquantized tensors beside them. A scale that the cast would change
            or make wider keeps its own dtype: the file holds exactly what the model computes with, and no more.
        format: one of `DISK_FORMATS`; None takes `disk_format` of weights without activation quantization.

    Raises:
        CanopyError: for a weight that the format cannot hold.
    """
    natural = disk_format(weight.scheme)
    format = format or natural
    if format != natural and (format, natural, weight.scheme.format.bits) != (INT, PACKED, 8):
        raise CanopyError(f"weights in {weight.scheme} are stored as {natural}, not as {format}")
    if len(weight.shape) != 2:
        raise CanopyError(f"a checkpoint holds weights of (out_features, in_features), got {tuple(weight.shape)}")
    bits = weight.scheme.format.bits
    tensors = {"weight_scale": _exact(weight.scale, dtype)}
    if format in (NVFP4, MXFP4):
        expected(weight.scheme, tuple(weight.shape), format)  # that no block is ragged
        tensors["weight_packed"] = weight.data.view(torch.uint8)
        if weight.global_scale is not None:
            tensors["weight_global_scale"] = weight.global_scale
    elif format == PACKED:
        _refuse_ambiguous(bits, weight.shape[1])
        words = weight.data if weight.data.dtype == torch.int32 else packing.pack_unchecked(weight.data, bits, 128)
        tensors |= {"weight_packed": words, "weight_shape": torch.tensor(weight.shape, dtype=torch.int64)}
    else:
        tensors["weight"] = weight.data
    if weight.zero_point is not None:
        packed = _packs_zero_point(weight.scheme, format)
        tensors["weight_zero_point"] = (
            packing.pack(weight.zero_point.T, bits).T.contiguous() if packed else weight.zero_point
        )
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def from_disk(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> QuantizedTensor:
    """The inverse of `to_disk`.

    Args:
        tensors: as `to_disk` gives them, by name, dtype and shape checked by `check`; integers with ``weight_packed``
            are ``pack-quantized``.
        scheme: of the weight. Its ``scale_dtype`` becomes that of the scale found.
        shape: (N, K).
        dtype: what `QuantizedTensor.dequantize` gives by default.

    Raises:
        CanopyError: for scales that are not finite and positive, codes outside the range of the scheme.
    """
    format = BLOCKS.get(scheme.format.name)
    if format is None:
        format = PACKED if "weight_packed" in tensors else FLOAT if isinstance(scheme.format, FloatFormat) else INT
    bits, scale = scheme.format.bits, tensors["weight_scale"]
    if format in (NVFP4, MXFP4):
        return _blocks_from_disk(tensors, scheme, shape, dtype)
    _raise_bad_scale(scale, "weight_scale")
    _raise_too_large(scale, "weight_scale", scheme, dtype)
    data = tensors["weight_packed" if format == PACKED else "weight"]
    if format == PACKED and bits == 8:
        data = packing.unpack(data, 8, shape[1]).contiguous()
    if format == FLOAT and bool((data.view(torch.int8) & 0x7F == 0x7F).any()):
        raise CanopyError("weight holds NaN; write the file again")
    zero_point = tensors.get("weight_zero_point")
    if zero_point is not None and _packs_zero_point(scheme, format):
        zero_point = packing.unpack(zero_point.T, bits, shape[0]).T.contiguous()
    elif zero_point is not None:
        _raise_bad_zero_point(zero_point, "weight_zero_point", scheme)
    scheme = replace(scheme, scale_dtype=scale.dtype)
    return QuantizedTensor(data, scale, zero_point, scheme, torch.Size(shape), dtype)


def _blocks_from_disk(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> QuantizedTensor:
    scale, second = tensors["weight_scale"], tensors.get("weight_global_scale")
    if second is not None:
        _raise_bad_scale(second, "weight_global_scale")
        _raise_bad_scale(scale.float(), "weight_scale")
    elif bool((scale == E8M0_NAN).any()):
        raise CanopyError("weight_scale holds NaN; write the file again")
    _raise_too_large(scheme.format.float_scale(scale, second), "weight_scale", scheme, dtype)
    words = tensors["weight_packed"].contiguous().view(torch.int32)
    return QuantizedTensor(words, scale, None, scheme, torch.Size(shape), dtype, second)


def _exact(scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A scale in another dtype if that changes none of its values and takes no more bytes."""
    if dtype is None or dtype.itemsize > scale.dtype.itemsize:
        return scale
    return scale.to(dtype) if torch.equal(scale.to(dtype).to(scale.dtype), scale) else scale


def _raise_bad_scale(scale: Tensor, name: str) -> None:
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise CanopyError(f"{name} holds values that are not finite and positive; write the file again")


def _raise_too_large(scale: Tensor, name: str, scheme: Scheme, dtype: torch.dtype) -> None:
    """Refuse scales that give values which ``dtype`` does not hold."""
    fmt = scheme.format
    largest = 2 ** (fmt.bits - scheme.symmetric) if isinstance(fmt, IntFormat) else fmt.largest
    if (most := float(scale.max()) * largest) > torch.finfo(dtype).max:
        raise CanopyError(f"{name} gives values up to {most:.3g}, more than {_word(dtype)} holds; use another dtype")


def _raise_bad_zero_point(zero_point: Tensor, name: str, scheme: Scheme) -> None:
    if not scheme.format.qmin <= int(zero_point.min()) <= int(zero_point.max()) <= scheme.format.qmax:
        raise CanopyError(f"{name} holds values outside the codes of {scheme.format.name}")


def check(
    found: Mapping[str, tuple[torch.dtype, tuple]],
    scheme: Scheme,
    shape: tuple[int, int],
    format: str,
    inputs: Scheme | None = None,
) -> None:
    """Raise `CanopyError` unless the tensors found, by dtype and shape, are those of `expected`."""
    scheme.granularity.check(shape)
    wanted = expected(scheme, shape, format, inputs)
    if missing := sorted(wanted.keys() - found.keys()):
        raise CanopyError(f"{missing[0]} is missing; the checkpoint is incomplete")
    if extra := sorted(found.keys() - wanted.keys()):
        raise CanopyError(f"{extra[0]} has no place in {format} weights in {scheme}; the config does not fit the file")
    for name, (dtypes, shape) in wanted.items():
        dtype, is_shape = found[name]
        if tuple(is_shape) != tuple(shape) or dtype not in dtypes:
            raise CanopyError(
                f"{name} is {_word(dtype)} {tuple(is_shape)}, by the config it has to be "
                f"{' or '.join(map(_word, dtypes))} {tuple(shape)}"
            )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packs_zero_point(scheme: Scheme, format: str) -> bool:
    """compressed-tensors packs the zero points of groups and channels, and leaves that of a tensor as it is."""
    return format == PACKED and scheme.granularity.kind != "tensor"
