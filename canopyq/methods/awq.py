"""AWQ: make the weights of loud inputs larger before rounding, so that they lose less.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", section 3.2.
Multiplying column j by s_j and dividing input j by s_j changes nothing before rounding; afterwards the error of that
column is s_j times smaller. s = (mean |x|)^α, with α by a search. The clipping that belongs to it is in `clip`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from canopyq.tensor.quantized_tensor import quantize_unpacked
from canopyq.tensor.scheme import Scheme

STEPS = 20  # α = 0, 1/20 … 19/20


def awq_scales(
    weights: Mapping[str, Tensor], mean_abs: Tensor, hessian: Tensor, schemes: Mapping[str, Scheme]
) -> tuple[Tensor, float]:
    """The input scales that leave the least output error after rounding to nearest.

    Args:
        weights: (N, K) of every layer that reads these inputs.
        mean_abs: of the inputs, (K,). Inputs that have to share a scale have the same value here.
        hessian: Σ x xᵀ / tokens, (K, K).
        schemes: of the layers that will be quantized; the others do not count.

    Returns:
        The scales (K,), all 1 if none helps, and the share of the output error that is left: 1 then.
    """
    loud = mean_abs.float().clamp(min=1e-8)
    best_scales, first, best = torch.ones_like(loud), None, float("inf")
    for step in range(STEPS):
        scales = loud.pow(step / STEPS)
        scales = (scales / (scales.amax() * scales.amin()).sqrt()).clamp(1e-4, 1e4)
        error = sum(_error(weights[name].float(), scales, hessian, scheme) for name, scheme in schemes.items())
        first = error if first is None else first
        if error < best:
            best_scales, best = scales, error
    return best_scales, best / first if first else 1.0


def _error(weight: Tensor, scales: Tensor, hessian: Tensor, scheme: Scheme) -> float:
    rounded = quantize_unpacked(weight * scales, scheme).dequantize(torch.float32) / scales
    error = weight - rounded
    return float(((error @ hessian) * error).sum())
