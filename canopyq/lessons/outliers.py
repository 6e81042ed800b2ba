"""Outlier channels: how far they stand out, how to make them stronger without changing the model, which ones matter.

A few input features of a linear layer are far larger than the others (Dettmers et al. 2022, "LLM.int8()", section 3).
One scale has to reach them, and the others are left with few codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.methods.equivalence import ScalePair
from canopyq.methods.structure import scale_pairs
from canopyq.nn.linear import QuantizedLinear


def spread(absmax: Tensor) -> float:
    """How far the largest feature stands out: its absmax over the median of all (K,)."""
    return (absmax.max() / absmax.median().clamp(min=torch.finfo(torch.float32).tiny)).item()


def salient(magnitude: Tensor, share: float = 0.01) -> Tensor:
    """Indices of the ``share`` of features (K,) with the largest magnitude, at least one, largest first.

    Activations decide which weights matter (Lin et al. 2024, "AWQ", section 3.1): a weight counts as much as what it is
    multiplied by.

    Raises:
        CanopyError: for a share that is none.
    """
    checks.number("share", share, 1e-9, 1)
    return magnitude.topk(max(1, round(share * len(magnitude)))).indices


@torch.no_grad()
def exaggerate_(model: nn.Module, channels: Sequence[int], factor: float = 64.0) -> nn.Module:
    """Make channels of every norm's output ``factor`` times larger, in place; what the model computes stays the same.

    Each norm's gain is multiplied there, and the matching input columns of the linear layers that read it are divided.
    With a power of two nothing is rounded, so every logit stays the same to the last bit. An exaggeration for
    experiments: no model was trained to have these outliers.

    Args:
        model: whose norms are read by linear layers alone and multiply by their gain as it is; not quantized.
        channels: indices of hidden features.
        factor: a power of two.

    Raises:
        CanopyError: for a factor that is no power of two, a channel that does not exist, and any other model. Nothing
            is changed then.
    """
    if math.frexp(checks.number("factor", factor, 2.0**-100, 2.0**100))[0] != 0.5:
        raise CanopyError(f"a factor of {factor} would be rounded; use a power of two, such as 64")
    found = norm_pairs(model)
    size = len(found[0].gain)
    channels = checks.sequence("channels", channels, 1)
    index = torch.tensor([checks.count("channels", channel, 0, size - 1) for channel in channels])
    for pair in found:
        pair.gain[index] *= factor
        if pair.bias is not None:
            pair.bias[index] *= factor
        for weight in pair.consumers.values():
            weight[:, index] /= factor
    return model


def norm_pairs(model: nn.Module) -> list[ScalePair]:
    """Every norm inside the blocks, with the weights of the linear layers that read its output.

    Raises:
        CanopyError: for a model without such norms, one whose norms add to their gain, and a quantized model.
    """
    if any(isinstance(module, QuantizedLinear) for module in checks.module("model", model).modules()):
        raise CanopyError("the model is quantized already; exaggerate its outliers first, and quantize then")
    pairs, _ = scale_pairs(model, "exaggerating channels")
    found = [pair for own in pairs.values() for pair in own if pair.is_norm]
    if not found or any(pair.offset for pair in found):
        raise CanopyError(
            f"the norms of a {type(model).__name__} model are read by more than linear layers, or add to their gain"
        )
    return found
