"""What was written, loaded again and compared with the model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canopyq.calibration.mode import eval_mode
from canopyq.checkpoint.load import load_as
from canopyq.errors import CanopyError
from canopyq.nn.linear import QuantizedLinear, quantized_layers

MOST = 0.05  # of the logits' norm: from run to run kernels differ by less, and another model by more
TOKENS = 64
INPUTS = ("input_scale", "input_zero_point")


@dataclass(frozen=True)
class Check:
    """What came back from the disk beside the model in memory, on a fixed batch of tokens.

    Attributes:
        tokens: how many.
        max_abs_difference: of any logit.
        kl: mean KL divergence, nats per token.
    """

    tokens: int
    max_abs_difference: float
    kl: float


@torch.inference_mode()
def read_back(model: nn.Module, folder: Path, plain: Mapping[str, Tensor], dtype: torch.dtype | None) -> Check:
    """Load what was written, and compare it with the model: every code and scale, which have to be the same; every
    other tensor, which has to be what its cast to the file's dtype makes of it; and then the answers of both. How far
    the cast itself moves them is for the caller to judge, and stands in the result.

    Args:
        plain: name in the model -> tensor, of what is not quantized.
        dtype: that it was written in; None for its own.

    Raises:
        CanopyError: for a file that does not hold the model.
    """
    parameter = next(model.parameters())
    loaded = load_as(
        folder, parameter.device, parameter.dtype, attention=getattr(model.config, "_attn_implementation", None)
    )
    modules = dict(loaded.named_modules())
    for name, layer in quantized_layers(model):
        _compare_layer(name, layer, modules.get(name))
    for name, tensor in plain.items():
        _compare_plain(name, tensor, loaded, dtype)
    ids = (
        torch.arange(TOKENS, device=parameter.device).mul(2654435761).remainder(model.config.vocab_size).reshape(2, -1)
    )
    with eval_mode(model):
        before, after = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, loaded))
        for name, tensor in plain.items():  # now both compute with the same numbers, and only their code can differ
            module, _, leaf = name.rpartition(".")
            own = nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor
            held = loaded.get_submodule(module)
            (held._parameters if leaf in held._parameters else held._buffers)[leaf] = own
        same = loaded(input_ids=ids, use_cache=False).logits.float()
    if not (off := float((before - same).norm() / before.norm())) <= MOST:
        raise CanopyError(
            f"what was written gives other answers than the model (logits off by {100 * off:.2g} %), and was removed; "
            "look for logits that are not finite, or a hook or method that the model's class does not have"
        )
    return Check(ids.numel(), float((before - after).abs().max()), _kl(before, after))


def _compare_layer(name: str, layer: QuantizedLinear, other: nn.Module | None) -> None:
    if isinstance(other, QuantizedLinear):
        mine, theirs = layer.quantized_weight.parts, other.quantized_weight.parts
        mine |= {leaf: getattr(layer, leaf) for leaf in INPUTS if getattr(layer, leaf) is not None}
        theirs |= {leaf: getattr(other, leaf) for leaf in INPUTS if getattr(other, leaf) is not None}
        if mine.keys() == theirs.keys() and all(_equal(mine[part], theirs[part]) for part in mine):
            return
    raise CanopyError(f"{name} came back from the file as something else, which was removed; please report it")


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether values are the same; scales may have found a narrower dtype that holds them."""
    if one.is_floating_point():
        one, other = one.float(), other.float()
    return torch.equal(one, other)


def _compare_plain(name: str, tensor: Tensor, loaded: nn.Module, dtype: torch.dtype | None) -> None:
    module, _, leaf = name.rpartition(".")
    found = getattr(loaded.get_submodule(module), leaf)
    stored = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    if not torch.equal(stored.to(found.dtype), found):
        raise CanopyError(f"{name} came back from the file as something else, which was removed; please report it")


def _kl(reference: Tensor, logits: Tensor) -> float:
    p, q = F.log_softmax(reference, -1), F.log_softmax(logits, -1)
    return max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0)  # in this order NaN stays NaN
