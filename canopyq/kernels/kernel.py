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


@dataclass(frozen=True)
class Kernel:
    """A way to compute a linear layer.

    Attributes:
        name: what `explain` calls it.
        layout: the layout that it reads.
        refuse: why it cannot run a problem, in words that tell what to change; None if it can.
        run: (x (M, K), held, problem) -> (M, N) in x's dtype, without the bias.
        most_rows: it is taken for inputs of at most so many rows; None for any; a function if that depends on the
            problem.
        example: a recipe that it is for.
        device: the type of device that it is for.
        takes_codes: x is a `QuantizedTensor`, where the others get quantized inputs dequantized.
    """

    name: str
    layout: Layout
    refuse: Callable[[Problem], str | None]
    run: Callable[..., Tensor]
    most_rows: int | Callable[[Problem], int] | None = None
    example: str = "w4a16-g128"
    device: str = "cpu"
    takes_codes: bool = False

    def settled(self, problem: Problem) -> Kernel:
        """The same with a number for ``most_rows``, or None."""
        return replace(self, most_rows=self.most_rows(problem)) if callable(self.most_rows) else self
