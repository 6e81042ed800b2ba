"""What flows into one layer of a model while it reads text: the three lines with a hook that lesson 02 shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def inputs_of(model: nn.Module, layer: str, *batches: Tensor) -> Tensor:
    """The inputs of one layer, of all tokens.

    Args:
        layer: a name in ``model.named_modules()``.
        batches: token ids, (sequences, tokens) each; the model reads one after the other.

    Returns:
        (tokens of all sequences and batches, in_features), in the model's dtype.
    """
    caught: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        with torch.no_grad():
            for ids in batches:
                model(ids)
    finally:
        hook.remove()
    return torch.cat([x.flatten(0, -2) for x in caught])
