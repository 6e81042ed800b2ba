"""Outlier channels: how far they stand out, how to make them stronger without changing the model, which ones matter.

A few input features of a linear layer are far larger than the others (Dettmers et al. 2022, "LLM.int8()", section 3).
One scale has to reach them, and the others are left with few codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from canopyq.errors import CanopyError

# A norm inside a block of a Llama-like model, and the linear layers that its output goes to and nothing else.
READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


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
    if not 0 < share <= 1:
        raise CanopyError(f"{share} is no share of the features; use e.g. 0.01")
    return magnitude.topk(max(1, round(share * len(magnitude)))).indices


@torch.no_grad()
def exaggerate_(model: nn.Module, channels: Sequence[int], factor: float = 64.0) -> nn.Module:
    """Make channels of every norm's output ``factor`` times larger, in place; what the model computes stays the same.

    Each norm's gain is multiplied there, and the matching input columns of the linear layers that read it are divided.
    With a power of two nothing is rounded, so every logit stays the same to the last bit. An exaggeration for
    experiments: no model was trained to have these outliers.

    Args:
        model: a Llama-like model (`READERS` names its norms), not quantized.
        channels: indices of hidden features.
        factor: a power of two.

    Raises:
        CanopyError: for a factor that is no power of two, a channel that does not exist, a model without such norms, or
            one whose norm does not multiply by its weight. Nothing is changed then.
    """
    if not factor > 0 or math.frexp(factor)[0] != 0.5:
        raise CanopyError(f"a factor of {factor} would be rounded; use a power of two, such as 64")
    pairs = norms_and_readers(model)
    index = torch.as_tensor(channels, dtype=torch.long)
    for name, norm, readers in pairs:
        size = norm.weight.numel()
        if not index.numel() or int(index.min()) < 0 or int(index.max()) >= size:
            raise CanopyError(
                f"channels {list(channels)} do not all exist; {name} has 0 to {size - 1}"
            )
        if not _multiplies(norm):
            raise CanopyError(f"{name} is a {type(norm).__name__}, which does not multiply by its weight")
        if any(reader.weight.is_meta for reader in readers):
            raise CanopyError(f"the layers after {name} have no values (meta device); load the model first")
    for _, norm, readers in pairs:
        norm.weight[index] *= factor
        for reader in readers:
            reader.weight[:, index] /= factor
    return model


def norms_and_readers(model: nn.Module) -> list[tuple[str, nn.Module, list[nn.Linear]]]:
    """Every norm inside the blocks, by name, with the linear layers that read its output.

    Raises:
        CanopyError: if there is none, or its layers are not plain nn.Linear any more.
    """
    found = []
    for name, block in model.named_modules():
        for norm, paths in READERS.items():
            if not hasattr(block, norm):
                continue
            readers = [_find(block, path) for path in paths]
            if any(type(reader) is not nn.Linear for reader in readers):
                raise CanopyError(
                    f"{name}: {norm} is not read by plain {', '.join(paths)}; quantize later"
                )
            found.append((f"{name}.{norm}", getattr(block, norm), readers))
    if not found:
        raise CanopyError(f"{type(model).__name__} has no {' or '.join(READERS)}: it is not a Llama-like model")
    return found


def _find(block: nn.Module, path: str) -> nn.Module | None:
    part: nn.Module | None = block
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def _multiplies(norm: nn.Module) -> bool:
    """Whether doubling the weight doubles the output; Gemma's norms multiply by 1 + weight."""
    weight = norm.weight
    if getattr(norm, "bias", None) is not None:
        return False
    x = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device).reshape(1, -1)
    twice = torch.func.functional_call(norm, {"weight": 2 * weight}, (x,))
    return torch.equal(twice, 2 * norm(x))
