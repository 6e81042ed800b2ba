"""What a layer asks of its kernel (`Problem`), and how kernels and memory layouts describe themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from canopyq.tensor.quantized_tensor import QuantizedTensor
from canopyq.tensor.scheme import Scheme


@dataclass(frozen=True)
class Problem:
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
    def of(cls, weight: QuantizedTensor, activations: Scheme | None = None) -> Problem:
        n, k = weight.shape
        return cls(weight.scheme, activations, n, k, weight.dtype, weight.data.device)


Held = Mapping[str, Tensor]  # a weight's tensors in some layout, by name


@dataclass(frozen=True)
class Layout:
    """A way to hold a weight: ``restore`` is the exact inverse of ``arrange``, so one copy is enough.

    Attributes:
        part: (held, problem, start, stop) -> rows start to stop of a held weight, in the same memory, or None if they
            cannot be had so. In a layout without it, no weight is a part of another.
    """

    name: str
    arrange: Callable[[QuantizedTensor], dict[str, Tensor]]
    restore: Callable[[Held, Problem], QuantizedTensor]
    part: Callable[[Held, Problem, int, int], dict[str, Tensor] | None] | None = None


Rows = tuple[range, ...]  # disjoint, ascending
MANY = 2**31  # more rows than there are
ANY: Rows = (range(1, MANY),)


def up_to(most: int) -> Rows:
    return (range(1, most + 1),)


@dataclass(frozen=True)
class Kernel:
    """A way to compute a linear layer.

    Attributes:
        name: what `explain` calls it.
        layout: the layout that it reads.
        refuse: why it cannot run a problem, in words that tell what to change; None if it can.
        run: (x (M, K), held, problem) -> (M, N) in x's dtype, without the bias.
        rows: ranges of the number of rows for which it is taken; a function if they depend on the problem.
        example: a recipe that it is for.
        device: the type of device that it is for.
        takes_codes: x is a `QuantizedTensor`, where the others get quantized inputs dequantized.
    """

    name: str
    layout: Layout
    refuse: Callable[[Problem], str | None]
    run: Callable[..., Tensor]
    rows: Rows | Callable[[Problem], Rows] = ANY
    example: str = "w4a16-g128"
    device: str = "cpu"
    takes_codes: bool = False

    def settled(self, problem: Problem) -> Kernel:
        """The same with ranges for ``rows``."""
        return replace(self, rows=self.rows(problem)) if callable(self.rows) else self

    def takes(self, rows: int) -> bool:
        """Whether a settled kernel is taken for an input of so many rows."""
        return any(rows in some for some in self.rows)
