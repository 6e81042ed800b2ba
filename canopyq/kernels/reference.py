"""The oracle: dequantize the whole weight, then multiply. Every other kernel is held to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from canopyq.kernels.spec import LinearSpec, PackedWeight, WeightLayout
from canopyq.tensor.quantized_tensor import QuantizedTensor


def prepack(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a `QuantizedTensor` as they are, under the names of the compressed-tensors checkpoint."""
    parts = dict(weight.parts)
    data = parts.pop("data")
    name = "weight_packed" if weight.scheme.format.bits < 8 else "weight"
    return {name: data} | {f"weight_{name}": part for name, part in parts.items()}


def unpack(packed: PackedWeight, spec: LinearSpec) -> QuantizedTensor:
    """The `QuantizedTensor` whose tensors these are; memory is shared."""
    data = packed["weight_packed"] if "weight_packed" in packed else packed["weight"]
    return QuantizedTensor(
        data,
        packed.get("weight_scale"),
        packed.get("weight_zero_point"),
        spec.weights,
        torch.Size([spec.n, spec.k]),
        spec.weight_dtype,
        packed.get("weight_global_scale"),
    )


def slice_rows(packed: PackedWeight, spec: LinearSpec, start: int, stop: int) -> dict[str, Tensor] | None:
    """Rows of a weight whose tensors all have a row for each of its rows."""
    if any(len(tensor) != spec.n for tensor in packed.values()):
        return None
    return {name: tensor[start:stop] for name, tensor in packed.items()}


CHECKPOINT_LAYOUT = WeightLayout("as in the checkpoint", prepack, unpack, slice_rows)


def linear(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    """x · Wᵀ with W dequantized to x's dtype: (M, K) -> (M, N). Differentiable in x."""
    return F.linear(x, unpack(packed, spec).dequantize(x.dtype))
