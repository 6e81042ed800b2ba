"""Codes of a layer's input at run time: from each input's own range, or from one that was fixed beforehand.

Nothing here waits for a GPU, so there are no checks: NaN in a token gives NaN in that token's outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq.kernels.cuda import eight_bits
from canopyq.tensor.observers import minmax
from canopyq.tensor.quantized_tensor import QuantizedTensor, quantize
from canopyq.tensor.scheme import Scheme


def fixed(x: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None) -> QuantizedTensor:
    """``x`` (M, K) in 8-bit codes by a static scale (1,); what lies beyond its range is clipped."""
    codes = scheme.quantize_rows(x.detach(), scale, zero_point)
    return QuantizedTensor(codes, scale, zero_point, scheme, x.shape, x.dtype)


def dynamic(x: Tensor, scheme: Scheme) -> QuantizedTensor:
    """``x`` (M, K) in 8-bit codes by the min-max range of each of its rows: per token, or of all per tensor.

    The codes and scales are those of ``quantize(x.float(), scheme)``, without its checks.
    """
    if eight_bits.takes(x, scheme):
        codes, scale = eight_bits.quantize_rows(x.detach(), scheme.format.name)
        return QuantizedTensor(codes, scale, None, scheme, x.shape, x.dtype)
    rows = scheme.granularity.rows(x.detach())
    codes, scale, zero_point = _min_max(rows, scheme)
    shape = scheme.granularity.scale_shape(x.shape)
    zero_point = None if zero_point is None else zero_point.reshape(shape)
    return QuantizedTensor(codes.reshape(x.shape), scale.reshape(shape), zero_point, scheme, x.shape, x.dtype)


def rounded(x: Tensor, scheme: Scheme, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Tensor:
    """What the codes of ``x`` (M, K) stand for, in its dtype: for kernels that do not take codes. Any scheme."""
    if scale is not None:
        return scheme.fake_quantize_rows(x.detach(), scale, zero_point)
    if scheme.format.scale_dtype is not None or scheme.is_plain_cast or scheme.observer != "minmax":
        return quantize(x, scheme).dequantize(x.dtype)
    codes, scale, zero_point = _min_max(scheme.granularity.rows(x.detach()), scheme)
    return scheme.granularity.from_rows(scheme.dequantize_rows(codes, scale, zero_point, dtype=x.dtype), x.shape)


def _min_max(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scale, zero_point = scheme.scale_and_zero_point(*minmax(rows, scheme), check=False)
    return scheme.quantize_rows(rows, scale, zero_point), scale, zero_point
