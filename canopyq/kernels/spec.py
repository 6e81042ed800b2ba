"""What a linear layer asks of its kernel (`LinearSpec`), and how a weight lies in memory for it (`WeightLayout`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from canopyq.tensor.quantized_tensor import QuantizedTensor
from canopyq.tensor.scheme import Scheme


@dataclass(frozen=True)
class LinearSpec:
    """All that decides which kernels can run a linear layer.

    Attributes:
        weights: scheme of the weight.
        activations: scheme of the input, or None if it stays as it is.
        n, k: out_features and in_features.
        weight_dtype: of the weight before it was quantized.
        device: where the layer lies.
    """

    weights: Scheme
    activations: Scheme | None
    n: int
    k: int
    weight_dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, weight: QuantizedTensor, activations: Scheme | None = None) -> LinearSpec:
        n, k = weight.shape
        return cls(weight.scheme, activations, n, k, weight.dtype, weight.data.device)


PackedWeight = Mapping[str, Tensor]  # a weight's tensors in some layout, by name


@dataclass(frozen=True)
class WeightLayout:
    """A way to lay a weight out in memory: ``unpack`` is the exact inverse of ``prepack``, so one copy is enough.

    Attributes:
        name: what `explain` says of a weight that lies so.
        prepack: a weight (N, K) -> its tensors in this layout.
        unpack: (packed, spec) -> the weight.
        slice_rows: (packed, spec, start, stop) -> rows start to stop of the weight in the same memory, or None if they
            cannot be had so. In a layout without it, no weight is a part of another.
    """

    name: str
    prepack: Callable[[QuantizedTensor], dict[str, Tensor]]
    unpack: Callable[[PackedWeight, LinearSpec], QuantizedTensor]
    slice_rows: Callable[[PackedWeight, LinearSpec, int, int], dict[str, Tensor] | None] | None = None


RowRanges = tuple[range, ...]  # numbers of rows of an input: disjoint, ascending
ROW_LIMIT = 2**31  # more rows than there are
ANY_ROWS: RowRanges = (range(1, ROW_LIMIT),)


def up_to(max_rows: int) -> RowRanges:
    return (range(1, max_rows + 1),)
