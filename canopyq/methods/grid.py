"""The values that the weights of a matrix can take once their scales are settled."""

from __future__ import annotations

from torch import Tensor

from canopyq import affine
from canopyq.formats import BlockFormat, IntFormat
from canopyq.granularity import Granularity
from canopyq.tensor import QuantizedTensor


class Grid:
    """The grid of a quantized matrix (N, K): its scales and zero points, laid out column by column.

    Args:
        start: any quantization of the matrix; only its scales and zero points count.
    """

    def __init__(self, start: QuantizedTensor) -> None:
        self.start, self.format = start, start.scheme.format
        n, k = start.shape
        self.step = _by_column(start.step(), start.scheme.granularity, n, k)
        self.zero = None
        if start.zero_point is not None:
            self.zero = _by_column(start.zero_point.float(), start.scheme.granularity, n, k)
        self._steps = self.step.unbind(0)  # a view for each column: the loops over columns live on small change
        if isinstance(self.format, IntFormat):
            ends = (self.format.qmin + start.scheme.restricted, self.format.qmax)
            self._ends = [ends] * k if self.zero is None else [(ends[0] - z, ends[1] - z) for z in self.zero.unbind(0)]

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """The grid point nearest to each of ``values`` (N,) in a column."""
        step = self._steps[column]
        if isinstance(self.format, IntFormat):
            return (values / step).round_().clamp_(*self._ends[column]).mul_(step)
        return self.format.round(values / step).mul_(step)

    def encode(self, values: Tensor) -> QuantizedTensor:
        """A matrix (N, K) of grid points as codes."""
        zero = None if self.zero is None else self.zero.t()
        codes = affine.quantize(values, self.step.t(), zero, self.format, restricted=self.start.scheme.restricted)
        return self.start.with_codes(codes)

    @property
    def has_free_scales(self) -> bool:
        """Whether any positive number may be a scale: not in MXFP4 and NVFP4, which keep theirs as small floats."""
        return not isinstance(self.format, BlockFormat)


def _by_column(stored: Tensor, granularity: Granularity, n: int, k: int) -> Tensor:
    """One number for each weight, (K, N): contiguous by column."""
    if granularity.kind == "tensor":
        return stored.reshape(1, 1).expand(k, n)
    if granularity.kind != "group":
        return stored.reshape(1, n).expand(k, n)
    return stored.t().repeat_interleave(granularity.group_size, dim=0)[:k].contiguous()
