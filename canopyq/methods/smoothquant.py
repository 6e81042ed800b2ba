"""SmoothQuant: move outliers from the inputs into the weights, which can take them.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", section 4.
Input j is divided by s_j = max |x_j|^α / max |w_j|^(1 − α) and column j multiplied by it. The paper takes one α for the
whole model; here each place gets the α whose outputs, computed with rounded inputs and weights on some real inputs, are
best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from canopyq.tensor.quantized_tensor import quantize_unpacked
from canopyq.tensor.scheme import Scheme

ALPHAS = tuple(step / 10 for step in range(2, 10))  # 0.2 … 0.9


def smooth_scales(
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    absmax: Tensor,
    schemes: Mapping[str, Scheme],
    activations: Scheme,
    share: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, float | None]:
    """The input scales for which rounded inputs times rounded weights come closest to the true outputs.

    Args:
        weights: (N, K) of every layer that reads these inputs.
        inputs: some of them, (M, K).
        absmax: largest magnitude of each input feature over all data, (K,).
        schemes: of the weights of the layers that will be quantized; the others do not count.
        activations: of the inputs.
        share: gives inputs that have to share a scale the largest of their values (K,).

    Returns:
        The scales (K,), and their α; all 1 and None if no α beats leaving the inputs alone.
    """
    loud = share(absmax.float()).clamp(min=1e-5)
    inputs = inputs.float()
    whole = {name: weights[name].float() for name in schemes}
    heavy = share(torch.stack([weight.abs().amax(0) for weight in whole.values()]).amax(0)).clamp(min=1e-5)
    wanted = {name: inputs @ weight.t() for name, weight in whole.items()}

    def error(scales: Tensor) -> float:
        rounded = quantize_unpacked(inputs / scales, activations).dequantize(torch.float32)
        total = 0.0
        for name, scheme in schemes.items():
            there = quantize_unpacked(whole[name] * scales, scheme).dequantize(torch.float32)
            total += float((wanted[name] - rounded @ there.t()).square().sum())
        return total

    best_scales = torch.ones_like(loud)
    best_alpha, best = None, error(best_scales)
    for alpha in ALPHAS:
        scales = (loud.pow(alpha) / heavy.pow(1 - alpha)).clamp(min=1e-5)
        if (cost := error(scales)) < best:
            best_scales, best_alpha, best = scales, alpha, cost
    return best_scales, best_alpha
