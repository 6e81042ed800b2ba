"""Quantize a model in place by a recipe, and report what was done to every layer."""

from __future__ import annotations

import html
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from canopyq.errors import CanopyError
from canopyq.linear import QuantizedLinear
from canopyq.memory import bytes_held, human
from canopyq.scheme import Recipe
from canopyq.tensor import QuantizedTensor, quantize
from canopyq.track import track


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear layer."""

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    sqnr_db: float


@dataclass(frozen=True)
class Report:
    """What `quantize_` did.

    Attributes:
        recipe: its name.
        layers: the quantized layers, in the model's order.
        kept: module name -> why its weight stayed as it is. Nothing that holds a weight is left out of both lists.
        bytes_before, bytes_after: storage behind the whole model's parameters and buffers.
    """

    recipe: str
    layers: tuple[LayerReport, ...]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int

    @property
    def worst(self) -> list[LayerReport]:
        """Layers with the most quantization noise first."""
        return sorted(self.layers, key=lambda layer: layer.sqnr_db)

    def __str__(self) -> str:
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        bits = sum(8 * layer.bytes_after for layer in self.layers) / weights
        lines = [
            f"{self.recipe}: {len(self.layers)} linear layers quantized, {bits:.3f} bits per weight; "
            f"model {human(self.bytes_before)} -> {human(self.bytes_after)}"
        ]
        lines += [f"  noisiest: {x.name} {x.shape[0]}x{x.shape[1]}, SQNR {x.sqnr_db:.1f} dB" for x in self.worst[:3]]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            lines.append(f"  kept: {shown} ({reason})")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def sqnr_db(original: Tensor, quantized: QuantizedTensor) -> float:
    """Signal to quantization noise, 10 · log10(Σ w² / Σ (w − ŵ)²), in dB: 6 dB more is one bit better."""
    signal = original.double().square().sum()
    noise = (original.double() - quantized.dequantize(torch.float32).double()).square().sum()
    return float(10 * torch.log10(signal / noise)) if noise > 0 else float("inf")


@torch.no_grad()
def quantize_(model: nn.Module, recipe: str | Recipe) -> Report:
    """Replace the linear layers of ``model`` by quantized ones, in place.

    Weights are rounded to the nearest code and kept packed. Every layer is quantized before the first is replaced, so
    that an error leaves the model as it was. A layer that the model uses in several places is quantized once and stays
    shared.

    Raises:
        CanopyError: for an unknown recipe, a model without linear layers to quantize or that is quantized already, a
            layer that the recipe's groups do not fit, NaN or infinite weights. The message names the layer.
    """
    recipe = Recipe.parse(recipe)
    if not isinstance(model, nn.Module):
        raise CanopyError(f"quantize_ needs a torch module, got {type(model).__name__}; load the model first")
    targets, kept = _sort_modules(model, recipe)
    bytes_before = bytes_held(model)
    quantized: dict[nn.Module, QuantizedLinear] = {}
    layers = []
    for name, linear in track(targets.items(), f"quantizing to {recipe.name}", len(targets)):
        try:
            weight = quantize(linear.weight, recipe.weights)
        except CanopyError as error:
            raise CanopyError(f"{name}: {error}") from None
        quantized[linear] = QuantizedLinear(weight, linear.bias).train(linear.training)
        before, noise = linear.weight.nbytes, sqnr_db(linear.weight, weight)
        layers.append(LayerReport(name, tuple(weight.shape), weight.bits_per_value, before, weight.nbytes, noise))
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in quantized:
            model.set_submodule(name, quantized[module])
    return Report(recipe.name, tuple(layers), kept, bytes_before, bytes_held(model))


def _sort_modules(model: nn.Module, recipe: Recipe) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers to quantize, and for every other module that holds a weight, why it is kept."""
    targets: dict[str, nn.Linear] = {}
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        label, kind = name or "the model", type(module).__name__
        if isinstance(module, QuantizedLinear):
            raise CanopyError(f"{label} is quantized already; start from a freshly loaded model")
        weights = list(module.parameters(recurse=False))
        if not weights and isinstance(weight := getattr(module, "weight", None), Tensor):
            weights = [weight]  # a frozen one, kept as a buffer
        if not weights:
            continue
        if any(is_lazy(weight) for weight in weights):
            raise CanopyError(f"{label} has no weights yet; call the model once, so that they take their shape")
        if recipe.ignores(name):
            kept[label] = "named in the recipe's ignore list"
        elif type(module) is nn.Linear:  # a subclass may do something else with its weight
            if not name:
                raise CanopyError(f"a bare {kind} has no place to be replaced in; use QuantizedLinear.from_linear")
            targets[name] = module
        elif isinstance(module, nn.Embedding):
            kept[label] = "an embedding: rows are looked up, not multiplied"
        elif all(weight.dim() < 2 for weight in weights):
            kept[label] = "a norm: a vector, too small to matter"
        else:
            kept[label] = f"a {kind}: only plain nn.Linear is quantized"
    if not targets:
        raise CanopyError(f"{type(model).__name__} has no nn.Linear left to quantize by {recipe.name}")
    return targets, kept
