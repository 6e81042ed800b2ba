"""Codes of a layer's input at run time: from each input's own range, or from one that was fixed beforehand.

Nothing here waits for a GPU, so there are no checks: NaN in a token gives NaN in that token's outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq.kernels.cuda import quantize_rows
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
    if quantize_rows.takes(x, scheme):
        codes, scale = quantize_rows.quantize_rows(x.detach(), scheme.format.name)
        return QuantizedTensor(codes, scale, None, scheme, x.shape, x.dtype)
    rows = scheme.granularity.rows(x.detach())
    codes, scale, zero_point = _min_max(rows, scheme)
    shape = scheme.granularity.scale_shape(x.shape)
    zero_point = None if zero_point is None else zero_point.reshape(shape)
    return QuantizedTensor(codes.reshape(x.shape), scale.reshape(shape), zero_point, scheme, x.shape, x.dtype)


def rounded(x: Tensor, scheme: Scheme, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Tensor:
    """What the codes of ``x`` (M, K) stand for, in its dtype: for kernels that do not take codes. Any scheme.

    Args:
        scale, zero_point: (1,) each, of a static range. For NVFP4 the global scale.
    """
    if scheme.format.scale_dtype is not None:
        return _rounded_blocks(x.detach(), scheme, scale)
    if scale is not None:
        return scheme.fake_quantize_rows(x.detach(), scale, zero_point)
    if scheme.is_plain_cast or scheme.observer != "minmax":
        return quantize(x, scheme).dequantize(x.dtype)
    codes, scale, zero_point = _min_max(scheme.granularity.rows(x.detach()), scheme)
    return scheme.granularity.from_rows(scheme.dequantize_rows(codes, scale, zero_point, dtype=x.dtype), x.shape)


def _rounded_blocks(x: Tensor, scheme: Scheme, global_scale: Tensor | None) -> Tensor:
    """Each block of FP4 on a scale of its own. MXFP4's is the next power of two for an absmax beyond 1.75 times one, as
    compressed-tensors has it: the specification, which weights follow, would cut such a value off at 1.5 times."""
    rows = scheme.granularity.rows(x.to(torch.promote_types(x.dtype, torch.float32)))
    absmax = rows.abs().amax(dim=1, keepdim=True).float()
    block = scheme.format.block_scale(absmax if scheme.format.has_global_scale else absmax * (2 / 1.75), global_scale)
    codes = scheme.quantize_rows(rows, block, None, global_scale)
    values = scheme.dequantize_rows(codes, block, None, global_scale, x.dtype)
    return torch.where(x.isnan(), x, scheme.granularity.from_rows(values, x.shape))  # which FP4 does not have


def _min_max(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scale, zero_point = scheme.scale_and_zero_point(*minmax(rows, scheme), check=False)
    return scheme.quantize_rows(rows, scale, zero_point), scale, zero_point
