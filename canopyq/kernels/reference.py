"""The oracle: dequantize the whole weight, then multiply. Every other kernel is held to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from canopyq.kernels.kernel import Held, Kernel, Layout, Problem
from canopyq.tensor.quantized_tensor import QuantizedTensor


def arrange(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a `QuantizedTensor` as they are, under the names of the compressed-tensors checkpoint."""
    parts = dict(weight.parts)
    data = parts.pop("data")
    packed = weight.scheme.format.bits < 8
    return {"weight_packed" if packed else "weight": data} | {f"weight_{name}": part for name, part in parts.items()}


def restore(held: Held, problem: Problem) -> QuantizedTensor:
    """The `QuantizedTensor` whose tensors these are; memory is shared."""
    data = held["weight_packed"] if "weight_packed" in held else held["weight"]
    return QuantizedTensor(
        data,
        held.get("weight_scale"),
        held.get("weight_zero_point"),
        problem.weights,
        torch.Size([problem.n, problem.k]),
        problem.weight_dtype,
        held.get("weight_global_scale"),
    )


def part(held: Held, problem: Problem, start: int, stop: int) -> dict[str, Tensor] | None:
    """Rows of a weight whose tensors all have a row for each of its rows."""
    if any(len(tensor) != problem.n for tensor in held.values()):
        return None
    return {name: tensor[start:stop] for name, tensor in held.items()}


PLAIN = Layout("as in the checkpoint", arrange, restore, part)


def linear(x: Tensor, held: Held, problem: Problem) -> Tensor:
    """x · Wᵀ with W dequantized to x's dtype: (M, K) -> (M, N). Differentiable in x."""
    return F.linear(x, restore(held, problem).dequantize(x.dtype))


def refuse(problem: Problem) -> None:
    """It runs everything, everywhere."""


REFERENCE = Kernel("reference: dequantize, then multiply", PLAIN, refuse, linear)
