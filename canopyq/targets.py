"""Which weights of a model a recipe quantizes, and why every other one is kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from inspect import getsource, isfunction
from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from canopyq.embedding import is_embedding
from canopyq.errors import CanopyError
from canopyq.experts import expert_weights, is_experts
from canopyq.linear import QuantizedLinear
from canopyq.offload import is_away, values
from canopyq.scheme import Recipe, Scheme


@dataclass(frozen=True)
class Target:
    """One weight that will be quantized.

    Attributes:
        name: of the quantized layer: the module's, or for an expert ``<module>.<number>.<projection>``.
        module: what holds it now.
        kind: ``"linear"``, ``"conv1d"`` (GPT-2's, a linear layer with its weight transposed), ``"embedding"`` or
            ``"expert"``.
        weight: (out_features, in_features), a view of what the model holds; on the meta device if the model is.
        scheme: how it is quantized.
    """

    name: str
    module: nn.Module
    kind: str
    weight: Tensor
    scheme: Scheme

    def read(self) -> Tensor:
        """The weight with its values, wherever accelerate keeps them.

        Raises:
            CanopyError: if they cannot be read.
        """
        if not self.weight.is_meta or not is_away(self.module):
            return self.weight
        held = values(self.module)
        if self.kind == "expert":
            return expert_weights(SimpleNamespace(**held))[".".join(self.name.split(".")[-2:])]
        return held["weight"].t() if self.kind == "conv1d" else held["weight"]


def find_targets(model: nn.Module, recipe: Recipe) -> tuple[list[Target], dict[str, str]]:
    """What to quantize, in the model's order, and for every other module that holds a weight, why it is kept.

    Raises:
        CanopyError: if the model is quantized already, has lazy weights, or nothing to quantize.
    """
    targets: list[Target] = []
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
        linear = linear_kind(module)
        if recipe.ignores(name):
            kept[label] = "named in the recipe's ignore list"
        elif (linear or isinstance(module, nn.Embedding)) and (reader := _reader(model, name)):
            kept[label] = f"{reader} computes with its weight itself; only plain calls are quantized"
        elif linear in ("linear", "conv1d"):
            if not name:
                raise CanopyError(f"a bare {kind} has no place to be replaced in; use QuantizedLinear.from_linear")
            weight = module.weight if linear == "linear" else module.weight.t()
            targets.append(Target(name, module, linear, weight, recipe.scheme_of(name)))
        elif linear == "expert":
            found = expert_weights(module).items()
            for part, weight in found:
                label = f"{name}.{part}"
                targets.append(Target(label, module, "expert", weight, recipe.scheme_of(label)))
        elif isinstance(module, nn.Embedding):
            if not recipe.embeddings:
                kept[label] = "an embedding: rows are looked up, not multiplied"
            elif is_embedding(module) and name:
                targets.append(Target(name, module, "embedding", module.weight, recipe.scheme_of(name)))
            else:
                kept[label] = f"a {kind}: of embeddings only plain ones and those that scale their rows are quantized"
        elif all(weight.dim() < 2 for weight in weights):
            kept[label] = "a norm: a vector, too small to matter"
        else:
            kept[label] = f"a {kind}: only plain nn.Linear, GPT-2's Conv1D and fused experts are quantized"
    if not targets:
        raise CanopyError(f"{type(model).__name__} has no linear layer left to quantize by {recipe.name}")
    return targets, kept


def _reader(model: nn.Module, name: str) -> str | None:
    """The class of the module around a layer if its code reads the layer's weight."""
    path, _, leaf = name.rpartition(".")
    parent = type(model.get_submodule(path))
    return parent.__name__ if name and leaf in _weights_read_by(parent) else None


@cache
def _weights_read_by(parent: type[nn.Module]) -> frozenset[str]:
    """The layers whose weight the code of a module reads instead of calling them, as Mamba's mixer does with
    ``dt_proj``: codes in place of the weight would end in an error, or in other numbers."""
    found: set[str] = set()
    for name, method in vars(parent).items():
        if isfunction(method) and name not in ("__init__", "_init_weights", "tie_weights"):
            try:
                found |= set(re.findall(r"\bself\.(\w+)\.weight\b", getsource(method)))
            except (OSError, TypeError):  # no source at hand
                continue
    return frozenset(found)


def linear_kind(module: nn.Module) -> str | None:
    """``"linear"``, ``"conv1d"`` or ``"expert"`` for what is quantized as linear layers, None for everything else."""
    if type(module) is nn.Linear:  # a subclass may do something else with its weight
        return "linear"
    if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return "conv1d"
    return "expert" if is_experts(module) else None
