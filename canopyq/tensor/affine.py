"""Scale and zero point; quantize, dequantize, fake-quantize. Pure functions.

    codes = clamp(round(x / scale) + zero_point, qmin, qmax)          x̂ = (codes − zero_point) · scale

Inside the range the error |x − x̂| is at most scale / 2. The range always contains zero, so that real zero has a code of
its own (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2.1). Shapes broadcast: rows (R, n) go with scales (R, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from canopyq import checks
from canopyq.checks import FLOATS
from canopyq.errors import CanopyError
from canopyq.tensor.formats import Format, IntFormat, get_format


def scale_and_zero_point(
    lo: Tensor,
    hi: Tensor,
    format: str | Format = "int8",
    *,
    symmetric: bool = True,
    restricted: bool = False,
    scale_dtype: torch.dtype | None = None,
    check: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The scale (and zero point) that lays the range [lo, hi] over a format's codes.

    Args:
        lo, hi: ends of each row's range, any equal shape, float.
        symmetric: zero sits in the middle and there is no zero point. The scale covers max(|lo|, |hi|).
        restricted: symmetric integers without their lowest code: ±127 rather than −128…127. Full range divides absmax
            by 127.5 (half the codes), restricted by 127.
        scale_dtype: the scale is rounded to this dtype before anything is divided by it, so that codes fit the scale
            that is really stored. Default: lo's dtype (float32 for integers).
        check: refuse NaN and scales that do not fit. Without it nothing waits for a GPU, and a row with NaN gets a NaN
            scale.

    Returns:
        scale (``scale_dtype``) and zero_point (int8, or None when symmetric). An all-zero row gets scale 1.

    Raises:
        CanopyError: for what ``check`` refuses, and a zero point for a format that has none.
    """
    fmt = get_format(format)
    checks.flag("symmetric", symmetric), checks.flag("restricted", restricted), checks.flag("check", check)
    dtype = scale_dtype or (lo.dtype if lo.dtype in FLOATS else torch.float32)
    compute_dtype = torch.promote_types(lo.dtype, torch.float32)
    lo, hi = lo.to(compute_dtype).clamp(max=0), hi.to(compute_dtype).clamp(min=0)
    # Divisors are tensors: CUDA divides by a Python number through its rounded reciprocal, and codes would differ from
    # the CPU's.
    if symmetric:
        absmax = torch.maximum(-lo, hi)
        span = (fmt.qmax - fmt.qmin) / 2 if isinstance(fmt, IntFormat) and not restricted else fmt.largest
        return _round_scale(absmax / lo.new_tensor(span), dtype, check), None
    if not isinstance(fmt, IntFormat):
        raise CanopyError(f"{fmt.name} is a signed float grid and has no zero point; use symmetric=True")
    steps = lo.new_tensor(fmt.qmax - fmt.qmin)
    scale = _round_scale(hi / steps - lo / steps, dtype, check)
    zero_point = (fmt.qmin - lo / scale.to(lo.dtype)).round().clamp(fmt.qmin, fmt.qmax)
    return scale, zero_point.to(torch.int8)


def _round_scale(scale: Tensor, dtype: torch.dtype, check: bool) -> Tensor:
    """``scale`` as it will be kept: rounded to ``dtype``, never zero, never infinite."""
    info = torch.finfo(dtype)
    if check and not bool((scale <= info.max).all()):  # so put, it catches NaN too
        cure = "bring the values into its range" if dtype == torch.float32 else "use scale_dtype=torch.float32"
        raise CanopyError(f"a scale of {scale.max().item():.3g} does not fit in {dtype}; {cure}")
    stored = scale.to(dtype)
    # Subnormals are far apart, and float16 has them from 6e-5 down: a scale is rounded up there, so that nothing clips.
    smallest = info.smallest_normal * info.eps
    short = (stored < info.smallest_normal) & (stored.to(scale.dtype) < scale)
    stored = torch.where(short, stored + smallest, stored)
    stored = stored.clamp(min=max(smallest, torch.finfo(torch.float32).tiny))  # float32 can still hold 1 / scale
    return torch.where(scale == 0, torch.ones_like(stored), stored)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    format: str | Format = "int8",
    *,
    restricted: bool = False,
) -> Tensor:
    """Codes of ``x``. Integers come as int8, floats as their torch dtype, 4-bit floats and tables as uint8."""
    fmt = get_format(format)
    checks.flag("restricted", restricted)
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    scaled = x.to(compute_dtype) / scale.to(compute_dtype)
    if not isinstance(fmt, IntFormat):
        return fmt.encode(scaled)
    codes = scaled.round_()
    if zero_point is not None:
        codes = codes.add_(zero_point)
    return codes.clamp_(fmt.qmin + restricted, fmt.qmax).to(torch.int8)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    format: str | Format = "int8",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The real values that ``codes`` stand for, computed in float32 (float64 if asked for) and returned as ``dtype``.

    Values beyond the end of ``dtype`` saturate: the lowest code of a full range may lie half a step outside.
    """
    dtype = checks.dtype("dtype", dtype)
    compute_dtype, end = torch.promote_types(dtype, torch.float32), torch.finfo(dtype).max
    values = get_format(format).decode(codes).to(compute_dtype)
    if zero_point is not None:
        values = values - zero_point
    return (values * scale.to(compute_dtype)).clamp_(-end, end).to(dtype)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    format: str | Format = "int8",
    *,
    restricted: bool = False,
) -> Tensor:
    """``x`` after a trip through its codes and back: what quantization leaves of it, in x's dtype."""
    return dequantize(quantize(x, scale, zero_point, format, restricted=restricted), scale, zero_point, format, x.dtype)
