"""How much a layer's outputs move, in double precision."""

from __future__ import annotations

from torch import Tensor

from canopyq.tensor.quantized_tensor import QuantizedTensor, UnpackedTensor


def output_cost(weight: Tensor, quantized: QuantizedTensor | UnpackedTensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ), the mean squared error of a layer's outputs, summed over them."""
    error = weight.double() - quantized.dequantize().double()
    return float((error @ hessian.double() * error).sum())
