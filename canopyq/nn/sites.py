"""Where a model holds weights that can be quantized.

This is the one inventory: quantizing, calibrating, saving, loading and disk to disk all go through it. How a module
holds its weights is known by its kind, in `nn/kinds/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from canopyq.errors import CanopyError
from canopyq.nn.kept import reason_kept
from canopyq.nn.kinds import Kind, kind_of, own_tensors
from canopyq.nn.linear import QuantizedLinear
from canopyq.nn.offload import is_away, values


@dataclass(frozen=True, eq=False)
class Site:
    """One weight that can be quantized.

    Attributes:
        name: of the layer that takes its place: the module's, or for an expert ``<module>.<number>.<projection>``.
        names: all that it has in a model that uses its module in several places; ``name`` is the first.
        module: what holds the weight.
        kind: how.
        part: of the module: ``"<number>.<projection>"`` of an expert, else "".
        tensor: the name in the model of the tensor that the weight is, or is a part of.
        weight: (out_features, in_features), a view of what the model holds; on the meta device if the model is.
    """

    name: str
    names: tuple[str, ...]
    module: nn.Module
    kind: Kind
    part: str
    tensor: str
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features); of an embedding (vocabulary, hidden)."""
        return tuple(self.weight.shape)

    @property
    def owner(self) -> str:
        """The name of the module."""
        return self.name.removesuffix(f".{self.part}") if self.part else self.name

    def read(self) -> Tensor:
        """The weight with its values, wherever accelerate keeps them.

        Raises:
            CanopyError: if they cannot be read.
        """
        if not self.weight.is_meta or not is_away(self.module):
            return self.weight
        return self.kind.split(self.module, values(self.module))[self.part][1]

    def bias(self) -> Tensor | None:
        """(out_features,), with its values."""
        return self.kind.biases(self.module, values(self.module)).get(self.part)


@dataclass(frozen=True, eq=False)
class Holder:
    """A module that holds weights of its own.

    Attributes:
        names: in every place of a shared one, in the model's order.
        kind: None if its weights cannot be quantized.
        reason: why they cannot; "" if they can.
    """

    names: tuple[str, ...]
    module: nn.Module
    kind: Kind | None
    reason: str

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its own weights, by their names in the module."""
        return own_tensors(self.module)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Its weights that can be quantized."""
        if self.kind is None:
            return ()
        found = []
        for part, (leaf, weight) in self.kind.split(self.module, self.tensors).items():
            names = tuple(_join(name, part) for name in self.names)
            found.append(Site(names[0], names, self.module, self.kind, part, _join(self.name, leaf), weight))
        return tuple(found)


def weight_holders(model: nn.Module) -> list[Holder]:
    """Every module of a model that holds weights of its own, each once, in the model's order. Those that are quantized
    already are left out.

    Raises:
        CanopyError: for lazy weights, which have no shape yet.
    """
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            label = name or "the model"
            raise CanopyError(f"{label} has no weights yet; call the model once, so that they take their shape")
    adapters, found = adapter_parts(model), []
    for module, names in places.items():
        if not isinstance(module, QuantizedLinear) and own_tensors(module):
            adapter = "a part of an adapter, which is trained beside the weights" if module in adapters else ""
            reason = adapter or reason_kept(model, names[0], module)
            found.append(Holder(tuple(names), module, None if reason else kind_of(module), reason))
    return found


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


def weight_sites(model: nn.Module) -> list[Site]:
    """Every weight of a model that can be quantized, in the model's order."""
    return [site for holder in weight_holders(model) for site in holder.sites]


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The layers that a model's answers come from: what its ``get_output_embeddings`` says; in a transformers model of
    which that says nothing, such as a classifier, the linear layers outside its base model; elsewhere the last one of
    the shape of the largest embedding."""
    if (head := getattr(model, "get_output_embeddings", lambda: None)()) is not None:
        return [head]
    linear = [module for module in model.modules() if (kind := kind_of(module)) is not None and kind.is_linear]
    if (base := getattr(model, "base_model", model)) is not model and isinstance(base, nn.Module):
        inside = set(base.modules())
        return [module for module in linear if module not in inside]
    embeddings = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    largest = max(embeddings, key=len, default=None)
    return [] if largest is None else [module for module in linear if module.weight.shape == largest.shape][-1:]


def beside_language_model(model: nn.Module) -> set[nn.Module]:
    """Of a model that is made of a ``language_model`` and others, as those that see or hear are in transformers, all
    modules outside it, such as a vision tower and the projector behind it. Its output heads are not among them."""
    names = dict(model.named_modules())
    parts = [module for name, module in names.items() if name.rpartition(".")[2] == "language_model"]
    if not parts:
        return set()
    return set(names.values()) - {module for part in parts for module in part.modules()} - set(output_heads(model))


def put_layers(sites: list[Site], layers: Mapping[str, nn.Module]) -> dict[nn.Module, nn.Module]:
    """Module -> what takes its place.

    Args:
        layers: name of a site -> its quantized layer; all of a module's or none.
    """
    parts: dict[nn.Module, list[Site]] = {}
    for site in sites:
        parts.setdefault(site.module, []).append(site)
    return {
        module: own[0].kind.replacement(module, [layers[site.name] for site in own]) for module, own in parts.items()
    }


def _join(name: str, leaf: str) -> str:
    return ".".join(part for part in (name, leaf) if part)
