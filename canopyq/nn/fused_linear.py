"""Several linear layers of one input as a single product: query, key and value; gate and up.

One product of 12,288 rows reads its weights faster than three of 4,096, and starts once. The fused layer holds the
memory, and the single ones come to look into it, so that a model that was fused is as large as before.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.quantized_tensor import QuantizedTensor

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what servers compute as one


def fused(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Each of ``names`` -> those of them that are computed in one with it, itself included."""
    together: dict[tuple[str, tuple[str, ...] | str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        together.setdefault((parent, next((part for part in FUSED if leaf in part), leaf)), []).append(name)
    return {name: tuple(alike) for alike in together.values() for name in alike}


class UnfusedLinears(nn.Module):
    """The layers one after the other, where they cannot be fused.

    Args:
        reason: why not.
    """

    def __init__(self, layers: tuple[nn.Module, ...], reason: str) -> None:
        super().__init__()
        self.layers, self.reason = nn.ModuleList(layers), reason

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


@torch.no_grad()
def fuse_linears(*layers: nn.Module) -> nn.Module:
    """A module that gives the outputs of all layers side by side: (…, K) -> (…, N1 + N2 + …).

    Plain and quantized linear layers are fused where their weights can lie in one piece of memory; else the result is
    an `UnfusedLinears`, which knows the reason.
    """
    if reason := _unfusable(layers):
        return UnfusedLinears(layers, reason)
    biases = [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat(biases)
    if type(layers[0]) is nn.Linear:
        return _fuse_plain(layers, bias)
    return _fuse_quantized(layers, bias)


def _unfusable(layers: tuple[nn.Module, ...]) -> str | None:
    kinds = {type(layer) for layer in layers}
    if len(kinds) > 1 or not kinds <= {nn.Linear, QuantizedLinear}:
        return f"they are of different kinds: {', '.join(sorted(kind.__name__ for kind in kinds))}"
    if len({layer.bias is None for layer in layers}) > 1:
        return "only some of them have a bias"
    if kinds == {nn.Linear}:
        same = {(layer.weight.dtype, layer.weight.device) for layer in layers}
        return None if len(same) == 1 else "their weights differ in dtype or device"
    first = layers[0]
    if any((layer.scheme, layer.activations) != (first.scheme, first.activations) for layer in layers):
        return "they are quantized by different schemes"
    if first.input_scale is not None:
        return "each has a static input range of its own"
    granularity = first.scheme.granularity
    if granularity.kind not in ("group", "channel") or (granularity.kind == "channel" and granularity.axis != 0):
        return f"a scale per {granularity} is not a row's own"
    if first.quantized_weight.global_scale is not None:
        return "each weight has a second scale of its own"
    return None


def _fuse_plain(layers: tuple[nn.Linear, ...], bias: Tensor | None) -> nn.Linear:
    rows = [layer.out_features for layer in layers]
    fused = nn.Linear(layers[0].in_features, sum(rows), bias=False, device="meta")
    fused.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    fused.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    for layer, part in zip(layers, fused.weight.split(rows), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=layer.weight.requires_grad)
    return fused


def _fuse_quantized(layers: tuple[QuantizedLinear, ...], bias: Tensor | None) -> nn.Module:
    weights = [layer.quantized_weight for layer in layers]
    fused = QuantizedLinear(_stacked(weights), bias, layers[0].activations).prepack()
    if fused.layout.slice_rows is None:
        return UnfusedLinears(layers, f"a weight that is held {fused.layout.name} cannot be shared")
    start, parts = 0, []
    for layer in layers:
        parts.append(fused.layout.slice_rows(fused.packed, fused.spec, start, start + layer.out_features))
        start += layer.out_features
    if any(part is None for part in parts):
        return UnfusedLinears(layers, f"held {fused.layout.name}, their rows do not begin where a block of rows does")
    for layer, part in zip(layers, parts, strict=True):
        layer.set_packed(part, fused.layout)
    return fused


def _stacked(weights: list[QuantizedTensor]) -> QuantizedTensor:
    """Weights (N, K) one below the other."""
    first = weights[0]
    zero_point = None if first.zero_point is None else torch.cat([weight.zero_point for weight in weights])
    return QuantizedTensor(
        torch.cat([weight.data for weight in weights]),
        torch.cat([weight.scale for weight in weights]),
        zero_point,
        first.scheme,
        torch.Size([sum(weight.shape[0] for weight in weights), first.shape[1]]),
        first.dtype,
    )
