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
from canopyq.methods.equivalence import KNOWN, ScalePair, scale_pairs
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
        model: of an architecture in `methods.equivalence.KNOWN`, not quantized.
        channels: indices of hidden features.
        factor: a power of two.

    Raises:
        CanopyError: for a factor that is no power of two, a channel that does not exist, and any other model. Nothing
            is changed then.
    """
    if math.frexp(checks.number("factor", factor, 2.0**-100, 2.0**100))[0] != 0.5:
        raise CanopyError(f"a factor of {factor} would be rounded; use a power of two, such as 64")
    found = norm_pairs(model)
    size = found[0].producer.weight.numel()
    channels = checks.sequence("channels", channels, 1)
    index = torch.tensor([checks.count("channels", channel, 0, size - 1) for channel in channels])
    for pair in found:
        pair.producer.weight[index] *= factor
        for consumer in pair.consumers.values():
            consumer.weight[:, index] /= factor
    return model


def norm_pairs(model: nn.Module) -> list[ScalePair]:
    """Every norm inside the blocks, with the linear layers that read its output.

    Raises:
        CanopyError: for an architecture whose norms and layers are not known, and for a quantized model.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in KNOWN:
        raise CanopyError(
            f"what reads the norms of a {kind or type(model).__name__} model is not known, only of {', '.join(KNOWN)}"
        )
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise CanopyError("the model is quantized already; exaggerate its outliers first, and quantize then")
    blocks = (f"model.layers.{i}" for i in range(model.config.num_hidden_layers))
    return [pair for block in blocks for pair in scale_pairs(model, block) if pair.is_norm]
