"""A quantized weight as the blocks of a GGUF tensor type. Pure functions on arrays.

A row of K values is cut into blocks of 32 (NVFP4: 64), each with its own scale beside its codes, so a scale that a
longer group or the whole row shares is written once a block. Layouts are those of ggml's ``ggml-common.h``; two
4-bit codes share a byte, value ``j`` of a block in the low half and value ``j + 16`` (NVFP4: ``j + 8``) in the high.

| type | holds | a block of 32 | bits a weight |
|---|---|---|---|
| Q8_0 | symmetric integers of 5 to 8 bits | float16 scale, 32 × int8 | 8.5 |
| Q4_0 | symmetric integers of 2 to 4 bits | float16 scale, 16 bytes of code + 8 | 4.5 |
| Q4_1 | asymmetric integers of 2 to 4 bits | float16 scale and minimum, 16 bytes | 5 |
| MXFP4 | mxfp4 | E8M0 scale, 16 bytes | 4.25 |
| NVFP4 | nvfp4 | 4 × E4M3 scale, 32 bytes (a block of 64), one float32 beside the tensor | 4.5 |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from canopyq.errors import CanopyError
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.quantized_tensor import QuantizedTensor
from canopyq.tensor.scheme import Scheme

BLOCK = {"Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "MXFP4": 32, "NVFP4": 64}


@dataclass(frozen=True)
class Blocks:
    """A weight (N, K) in GGUF's layout.

    Attributes:
        data: uint8 (N, bytes of a row).
        type: name of the GGML type.
        tensor_scale: NVFP4's float32 factor, stored as a tensor of its own; None for the others.
        rounded: how many of Q4_1's minima float16 does not hold exactly. The codes and scales always are.
        count: how many minima there are.
    """

    data: np.ndarray
    type: str
    tensor_scale: float | None = None
    rounded: int = 0
    count: int = 0


def type_of(scheme: Scheme, k: int) -> str:
    """The GGML type that holds the codes of a weight with ``k`` in_features.

    Raises:
        CanopyError: if none does, with the reason.
    """
    fmt, granularity = scheme.format, scheme.granularity
    if isinstance(fmt, IntFormat) and scheme.symmetric:
        kind = "Q4_0" if fmt.bits <= 4 else "Q8_0"
    elif isinstance(fmt, IntFormat) and fmt.bits <= 4:
        kind = "Q4_1"
    elif fmt.name in ("mxfp4", "nvfp4"):
        kind = fmt.name.upper()
    else:
        raise CanopyError(f"no GGUF type holds codes of {scheme}; use requantize='q8_0' to round the weight anew")
    if granularity.kind not in ("tensor", "channel", "group") or granularity.axis != 0:
        raise CanopyError(f"GGUF has no scale per {granularity}; use requantize='q8_0' to round the weight anew")
    size = granularity.group_size if granularity.kind == "group" else None
    unit = 16 if kind == "NVFP4" else 32
    if size is not None and size % unit:
        raise CanopyError(f"groups of {size} do not fill GGUF's blocks of {unit}; use g32, g64 or g128")
    if k % BLOCK[kind] or (size is not None and k % size):
        raise CanopyError(
            f"{k} in_features do not fill {kind}'s blocks of {BLOCK[kind]}; keep this layer by the ignore list"
        )
    return kind


def to_blocks(weight: QuantizedTensor, rows: np.ndarray | None = None) -> Blocks:
    """The blocks of a weight (N, K), every code and scale exactly as it is.

    Args:
        rows: the order in which rows are written, as llama.cpp permutes those of Llama's queries and keys.

    Raises:
        CanopyError: if no type holds the codes, or float16 does not hold a scale exactly.
    """
    n, k = weight.shape
    kind = type_of(weight.scheme, k)
    order = slice(None) if rows is None else rows
    codes = weight.codes.cpu().numpy()[order]
    if kind == "MXFP4":
        exponent = weight.scale.cpu().reshape(n, k // 32, 1).numpy()[order]
        return Blocks(_join(exponent, _halves(codes.reshape(n, -1, 32))), kind)
    if kind == "NVFP4":
        # ggml reads the four scales of a block as unsigned E4M3; ours are never negative.
        scale = weight.scale.cpu().view(torch.uint8).reshape(n, k // 64, 4).numpy()[order]
        packed = _halves(codes.reshape(n, k // 16, 16)).reshape(n, k // 64, 32)
        return Blocks(_join(scale, packed), kind, float(1 / weight.global_scale))
    scale = _per_block(weight.float_scale().cpu().numpy(), n, k)[order]
    half = scale.astype(np.float16)
    if inexact := int((half.astype(np.float32) != scale).sum()):
        worst = scale[half.astype(np.float32) != scale][0]
        raise CanopyError(
            f"{inexact} of {scale.size} scales, such as {worst:.6g}, are none of float16, which GGUF keeps them in; "
            "use requantize='q8_0' to round the weight anew"
        )
    if kind == "Q8_0":
        return Blocks(_join(half[..., None].view(np.uint8), codes.reshape(n, -1, 32).view(np.uint8)), kind)
    unsigned = (codes.reshape(n, -1, 32) + 8).astype(np.uint8)
    if kind == "Q4_0":
        return Blocks(_join(half[..., None].view(np.uint8), _halves(unsigned)), kind)
    zero_point = _per_block(weight.zero_point.cpu().numpy().astype(np.float32), n, k)[order]
    minimum = -scale * (zero_point + 8)
    low = minimum.astype(np.float16)
    if not np.isfinite(low).all():
        raise CanopyError(f"a minimum of {np.abs(minimum).max():.6g} is beyond float16; use a symmetric recipe")
    rounded = int((low.astype(np.float32) != minimum).sum())
    data = _join(half[..., None].view(np.uint8), low[..., None].view(np.uint8), _halves(unsigned))
    return Blocks(data, kind, rounded=rounded, count=minimum.size)


def _per_block(values: np.ndarray, n: int, k: int) -> np.ndarray:
    """One value for each 32 columns, (N, K/32), of values that are (1,), (N, 1) or (N, groups)."""
    values = np.broadcast_to(values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1), (n, values.size // n or 1))
    return np.repeat(values, k // 32 // values.shape[1], axis=1)


def _halves(codes: np.ndarray) -> np.ndarray:
    """4-bit codes (…, 2h) as bytes (…, h): code j in the low half, code j + h in the high one."""
    h = codes.shape[-1] // 2
    return codes[..., :h] | (codes[..., h:] << 4)


def _join(*parts: np.ndarray) -> np.ndarray:
    whole = np.concatenate([np.ascontiguousarray(part).reshape(*part.shape[:2], -1) for part in parts], axis=-1)
    return whole.reshape(len(whole), -1)
