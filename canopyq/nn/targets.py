"""Which weights of a model a recipe quantizes, and why every other one is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from inspect import getsource, isfunction
from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from canopyq.errors import CanopyError, did_you_mean, shown
from canopyq.nn.embedding import is_embedding
from canopyq.nn.experts import expert_weights, is_experts
from canopyq.nn.linear import QuantizedLinear
from canopyq.nn.offload import is_away, values
from canopyq.tensor.scheme import Recipe, Scheme, is_part


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
        CanopyError: if the model is quantized already, has lazy weights, or nothing to quantize; for an entry of the
            recipe's ignore list that fits no module, and an exception that counts for no weight.
    """
    targets: list[Target] = []
    kept: dict[str, str] = {}
    places: dict[nn.Module, list[str]] = {}  # a shared module has several
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    adapters = adapter_parts(model)
    _check_ignored(model, recipe, [name for names in places.values() for name in names])
    for module, names in places.items():
        name = names[0]
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
        if module in adapters:
            kept[label] = "a part of an adapter, which is trained beside the weights"
        elif recipe.ignores(*names):
            kept[label] = "named in the recipe's ignore list"
        elif (linear or isinstance(module, nn.Embedding)) and (reader := _reader(model, name)):
            kept[label] = f"{reader} computes with its weight itself; only plain calls are quantized"
        elif linear in ("linear", "conv1d"):
            if not name:
                raise CanopyError(f"a bare {kind} has no place to be replaced in; use QuantizedLinear.from_linear")
            weight = module.weight if linear == "linear" else module.weight.t()
            targets.append(Target(name, module, linear, weight, recipe.scheme_of(*names)))
        elif linear == "expert":
            found = expert_weights(module).items()
            for part, weight in found:
                label = f"{name}.{part}"
                parts = [f"{place}.{part}" for place in names]
                targets.append(Target(label, module, "expert", weight, recipe.scheme_of(*parts)))
        elif isinstance(module, nn.Embedding):
            if not recipe.embeddings:
                kept[label] = "an embedding: rows are looked up, not multiplied"
            elif is_embedding(module) and name:
                targets.append(Target(name, module, "embedding", module.weight, recipe.scheme_of(*names)))
            else:
                kept[label] = f"a {kind}: of embeddings only plain ones and those that scale their rows are quantized"
        elif all(weight.dim() < 2 for weight in weights):
            kept[label] = "a norm: a vector, too small to matter"
        else:
            kept[label] = f"a {kind}: only plain nn.Linear, GPT-2's Conv1D and fused experts are quantized"
    if not targets:
        raise CanopyError(f"{type(model).__name__} has no linear layer left to quantize by {recipe.name}")
    _check_exceptions(recipe, targets, places, kept)
    return targets, kept


def adapter_parts(model: nn.Module) -> set[nn.Module]:
    """What peft has put beside layers of the model: all parts of a layer of its, but the ``base_layer`` in it."""
    return {
        part
        for module in model.modules()
        if hasattr(module, "adapter_layer_names")
        for name, child in module.named_children()
        if name != "base_layer"
        for part in child.modules()
    }


def _check_ignored(model: nn.Module, recipe: Recipe, names: list[str]) -> None:
    """Refuse what would silently keep nothing. The default entry may: a model need not have a head."""
    for part in recipe.ignore:
        if part == "lm_head" or any(is_part(part, name) for name in names):
            continue
        experts = any(is_part(part, f"{name}.{expert}") for name, expert in _expert_names(model))
        reason = "names experts one by one, which are quantized all or none" if experts else "fits no module"
        raise CanopyError(
            f"{shown(part)} of the ignore list of {recipe.name} {reason} of {type(model).__name__}"
            f"{_nearest(part, names)}"
        )


def _check_exceptions(
    recipe: Recipe, targets: list[Target], places: dict[nn.Module, list[str]], kept: dict[str, str]
) -> None:
    """Refuse an exception that counts for no weight: what it says would be done is not."""
    names = []
    for target in targets:
        first, *others = places[target.module]
        names.append([target.name, *(other + target.name.removeprefix(first) for other in others)])
    counts = {recipe.exception_of(*own) for own in names}
    for number, (part, _) in enumerate(recipe.exceptions):
        if number in counts:
            continue
        fits = [own for own in names if any(is_part(part, name) for name in own)]
        if fits:
            earlier = recipe.exceptions[recipe.exception_of(*fits[0])][0]
            reason = f"comes after {shown(earlier)}, which fits the same layers; put it first"
        elif stays := next((name for name in kept if is_part(part, name)), None):
            reason = f"counts for nothing: {stays} is kept ({kept[stays]})"
        else:
            reason = f"fits no layer{_nearest(part, [name for own in names for name in own])}"
        raise CanopyError(f"exception {shown(part)} of {recipe.name} {reason}")


def _expert_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Each module of fused experts, and each projection in it."""
    for name, module in model.named_modules():
        if is_experts(module):
            yield from ((name, part) for part in expert_weights(module))


def _nearest(part: str, names: list[str]) -> str:
    """The nearest dotted parts of the names that there are, of as many words."""
    count = part.count(".") + 1
    words = (name.split(".") for name in names)
    known = {".".join(word[i : i + count]) for word in words for i in range(len(word) - count + 1)}
    return did_you_mean(part, sorted(known)) or "; print(model) shows the names"


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
