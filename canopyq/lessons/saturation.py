"""What goes wrong at the end of the range: values that are clipped, and codes that wrap around.

A code beyond the last one has to be clamped. Stored in b bits without that, it loses its upper bits and comes out at
the other end: 150 becomes −106 in INT8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.tensor import affine
from canopyq.tensor.formats import Format, IntFormat, get_format


def wrap(codes: Tensor, bits: int = 8) -> Tensor:
    """What is left of integer ``codes`` (any shape) in ``bits`` bits of two's complement: int8.

    >>> wrap(torch.tensor([127, 128, 150]))
    tensor([ 127, -128, -106], dtype=torch.int8)

    Raises:
        CanopyError: for more than 8 bits or fewer than 2.
    """
    checks.count("bits", bits, 2, 8)
    half = 2 ** (bits - 1)
    return (torch.remainder(codes.to(torch.int64) + half, 2 * half) - half).to(torch.int8)


def quantize_without_clamp(x: Tensor, scale: Tensor, format: str | Format = "int8") -> Tensor:
    """Codes of ``x`` by ``round(x / scale)`` in x's own dtype and no clamp: a mistake to learn from.

    In bfloat16 it goes wrong even where nothing lies outside: 127.5 is rounded to 128, which INT8 has not.

    Raises:
        CanopyError: for a format that is not an integer.
    """
    fmt = get_format(format)
    if not isinstance(fmt, IntFormat):
        raise CanopyError(f"{fmt.name} has no integers to wrap around; use int8 or int4")
    return wrap((x / scale.to(x.dtype)).round(), fmt.bits)


@dataclass(frozen=True)
class Clipped:
    """What a range does to values: the share that it clips, and the mean squared error of those and of the others."""

    share: float
    clipping: float
    rounding: float

    @property
    def error(self) -> float:
        """Mean squared error of all values."""
        return self.clipping + self.rounding


def clipped(x: Tensor, end: float | Tensor, format: str | Format = "int8", counts: Tensor | None = None) -> Clipped:
    """What becomes of the values of ``x`` if the symmetric range ends at ± ``end``.

    ``counts`` says how often each value occurs; without them, once.

    Raises:
        CanopyError: for a range that ends below zero, or is none.
    """
    limit = torch.as_tensor(end, dtype=torch.float32, device=x.device).reshape(1)
    if not bool(limit >= 0):
        raise CanopyError(f"a range that ends at {limit.item():g} holds nothing; use zero or more")
    values = x.detach().float().flatten()
    scale, _ = affine.scale_and_zero_point(-limit, limit, format)
    squared = (affine.fake_quantize(values, scale, None, format) - values).square()
    beyond = values.abs() > limit
    share = torch.ones_like(values) if counts is None else counts.flatten()
    share = share.double() / share.sum()
    return Clipped(*(float((each * share).sum()) for each in (beyond, squared * beyond, squared * ~beyond)))
