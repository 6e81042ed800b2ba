"""Where a model holds weights that can be quantized: linear layers, GPT-2's Conv1D, embeddings, experts, the head.

This is the one inventory: quantizing, calibrating, saving, loading and disk to disk all go through it. A `Kind` says
how one kind of module holds its weights, what goes into each of them, and what takes the module's place. An
architecture that holds them otherwise is one more kind here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from inspect import getsource, isfunction, signature

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from canopyq.errors import CanopyError
from canopyq.nn.embedding import QuantizedEmbedding
from canopyq.nn.experts import QuantizedExperts, QuantizedParallelExperts, QuantizedSortedExperts
from canopyq.nn.linear import QuantizedLinear
from canopyq.nn.offload import is_away, values


class Kind:
    """How one kind of module holds weights (out_features, in_features).

    Attributes:
        is_linear: a call of the module is x · Wᵀ + b, with one weight.
        multiplies: what goes in are activations, and not token ids.
        transposed: the module, and the files, have the weight as (in_features, out_features).
        unwatched: why what goes in cannot be told, "" if it can.
        config_class: what a ``quantization_config`` calls layers of this kind.
    """

    is_linear = True
    multiplies = True
    transposed = False
    unwatched = ""
    config_class = "Linear"

    def fits(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        raise NotImplementedError

    def split(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        """Part -> the tensor in which it lies, and its weight (out_features, in_features), a view of that tensor.

        Args:
            tensors: the module's own, by name.
        """
        return {"": ("weight", tensors["weight"])}

    def biases(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Part -> its bias (out_features,), of those that have one."""
        return {"": tensors["bias"]} if tensors.get("bias") is not None else {}

    def parted(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Tensor -> in how many parts `split` divides it along each of its dimensions."""
        return {"weight": (1, 1)}

    def inputs(
        self, module: nn.Module, given: list, parts: Collection[str]
    ) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
        """What goes into each of the module's weights in a call: parts, rows (…, in_features), and the index (rows,) of
        the token that each row belongs to; None where rows are tokens.

        Args:
            given: the arguments of the call.
            parts: those that somebody wants to know of.
        """
        yield [""], given[0], None

    def tokens(self, module: nn.Module, given: list) -> int:
        """How many tokens a call is about."""
        return given[0].numel() // given[0].shape[-1]

    def layer(self, module: nn.Module, *packed) -> QuantizedLinear:
        """A quantized layer for one weight. ``packed``: the arguments of `QuantizedLinear`."""
        return QuantizedLinear(*packed)

    def replacement(self, module: nn.Module, layers: list[nn.Module]) -> nn.Module:
        """What takes the module's place, of its quantized layers in the order of `split`."""
        (layer,) = layers
        return layer


class Linear(Kind):
    """nn.Linear, and of its subclasses those that do the same with their weight."""

    def fits(self, module: nn.Module) -> bool:
        own = type(module)
        same = isinstance(module, nn.Linear) and (own.forward is nn.Linear.forward or own.__name__ == "FalconLinear")
        return same and "weight" in _tensors(module) and not hasattr(module, "parametrizations")


class Conv1D(Kind):
    """GPT-2's: a linear layer with its weight transposed."""

    transposed = True

    def fits(self, module: nn.Module) -> bool:
        return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")

    def split(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        return {"": ("weight", tensors["weight"].t())}


class Embedding(Kind):
    """Looks rows up as they are, or as transformers' ``…ScaledWordEmbedding`` times ``embed_scale``. Other subclasses
    of nn.Embedding, such as OPT's positions, do something else with their input."""

    is_linear = False
    multiplies = False
    config_class = "Embedding"

    def fits(self, module: nn.Module) -> bool:
        scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
        return isinstance(module, nn.Embedding) and (type(module) is nn.Embedding or scaled) and module.max_norm is None

    def layer(self, module: nn.Module, *packed) -> QuantizedLinear:
        return QuantizedEmbedding.like(module, packed[0])


class Experts(Kind):
    """All experts of a layer in two 3-D tensors, as transformers has them: ``gate_up_proj`` (experts, 2 · intermediate,
    hidden), or ``up_proj`` where they have no gate, and ``down_proj`` (experts, hidden, intermediate). The flags that
    its `use_experts_implementation` sets say what is otherwise: both transposed, gate and up in alternating rows,
    biases."""

    is_linear = False
    FLAGS = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    replaced_by = QuantizedExperts

    def fits(self, module: nn.Module) -> bool:
        tensors = dict(module.named_parameters(recurse=False))
        first, flag = self._first(module), partial(self._flag, module)
        names = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if flag("has_bias") else set())
        if set(tensors) != names or any(tensors[name].dim() != 3 for name in (first, "down_proj")):
            return False
        if len(signature(module.forward).parameters) < 3 or not (
            hasattr(module, "act_fn") or hasattr(module, "_apply_gate")
        ):
            return False
        up, down = (tensors[name].mT if flag("is_transposed") else tensors[name] for name in (first, "down_proj"))
        width = up.shape[1] // (2 if flag("has_gate") else 1)
        return down.shape[1:] == (up.shape[2], width) and (len(up) == len(down) or hasattr(module, "identity_expert"))

    def split(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        first, found = self._first(module), {}
        count = len(tensors["down_proj"])  # LongCat has rows of no expert after the last
        for i, (up, down) in enumerate(zip(tensors[first][:count], tensors["down_proj"], strict=True)):
            up, down = (up.t(), down.t()) if self._flag(module, "is_transposed") else (up, down)
            for name, rows in self._projections(module, up).items():
                found[f"{i}.{name}"] = (first, rows)
            found[f"{i}.down_proj"] = ("down_proj", down)
        return found

    def biases(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._flag(module, "has_bias"):
            return {}
        found, ups = {}, tensors[f"{self._first(module)}_bias"]
        for i, (up, down) in enumerate(zip(ups, tensors["down_proj_bias"], strict=True)):
            found |= {f"{i}.{name}": part for name, part in self._projections(module, up).items()}
            found[f"{i}.down_proj"] = down
        return found

    def parted(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        first, rows = self._first(module), 2 if self._flag(module, "has_gate") else 1
        turned = self._flag(module, "is_transposed")
        return {
            first: (len(tensors[first]), 1, rows) if turned else (len(tensors[first]), rows, 1),
            "down_proj": (len(tensors["down_proj"]), 1, 1),
        }

    def inputs(
        self, module: nn.Module, given: list, parts: Collection[str]
    ) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
        """Each expert sees the tokens that were routed to it; what goes into its last projection is computed here."""
        x, chosen = given[:2]
        for number in range(len(module.down_proj)):
            token = (chosen == number).any(-1).nonzero().flatten()
            yield from self._into(module, number, x[token], token, parts)

    def replacement(self, module: nn.Module, layers: list[nn.Module]) -> nn.Module:
        names = ("gate_proj", "up_proj", "down_proj") if self._flag(module, "has_gate") else ("up_proj", "down_proj")
        groups = [layers[i : i + len(names)] for i in range(0, len(layers), len(names))]
        return self.replaced_by([dict(zip(names, own, strict=True)) for own in groups], module)

    def _flag(self, module: nn.Module, name: str) -> bool:
        return getattr(module, name, self.FLAGS[name])

    def _first(self, module: nn.Module) -> str:
        return "gate_up_proj" if self._flag(module, "has_gate") else "up_proj"

    def _projections(self, module: nn.Module, rows: Tensor) -> dict[str, Tensor]:
        if not self._flag(module, "has_gate"):
            return {"up_proj": rows}
        halves = rows.chunk(2) if self._flag(module, "is_concatenated") else (rows[::2], rows[1::2])
        return dict(zip(("gate_proj", "up_proj"), halves, strict=True))

    def _into(
        self, module: nn.Module, number: int, x: Tensor, token: Tensor, parts: Collection[str]
    ) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        first = self._first(module)
        yield [f"{number}.gate_proj", f"{number}.up_proj"], x, token
        if f"{number}.down_proj" not in parts or not len(token):
            return
        weight, bias = getattr(module, first)[number], getattr(module, f"{first}_bias", None)
        weight = weight.t() if self._flag(module, "is_transposed") else weight
        y = F.linear(x, weight, None if bias is None else bias[number])
        if first == "up_proj":
            y = module.act_fn(y)
        elif hasattr(module, "_apply_gate"):
            y = module._apply_gate(y)
        else:
            gate, up = y.chunk(2, dim=-1)
            y = module.act_fn(gate) * up
        yield [f"{number}.down_proj"], y, token


class SortedExperts(Experts):
    """Llama 4's, both tensors transposed. Every expert gets all tokens, those that are not routed to it as zeros."""

    FLAGS = Experts.FLAGS | {"is_transposed": True}
    replaced_by = QuantizedSortedExperts

    def fits(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Llama4TextExperts"

    def tokens(self, module: nn.Module, given: list) -> int:
        return super().tokens(module, given) // len(module.down_proj)

    def inputs(
        self, module: nn.Module, given: list, parts: Collection[str]
    ) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
        for number, rows in enumerate(given[0].reshape(len(module.down_proj), -1, given[0].shape[-1])):
            token = rows.any(-1).nonzero().flatten()
            yield from self._into(module, number, rows[token], token, parts)


class ParallelExperts(Kind):
    """JetMoE's: one projection of all experts, ``weight`` (experts, out_features, in_features)."""

    is_linear = False
    unwatched = "nothing says which tokens its experts get"

    def fits(self, module: nn.Module) -> bool:
        return type(module).__name__ == "JetMoeParallelExperts"

    def split(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        return {str(i): ("weight", weight) for i, weight in enumerate(tensors["weight"])}

    def parted(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {"weight": (len(tensors["weight"]), 1, 1)}

    def inputs(
        self, module: nn.Module, given: list, parts: Collection[str]
    ) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
        return iter(())

    def replacement(self, module: nn.Module, layers: list[nn.Module]) -> nn.Module:
        return QuantizedParallelExperts(layers)


KINDS = (Linear(), Conv1D(), Embedding(), SortedExperts(), ParallelExperts(), Experts())


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
        return _tensors(self.module)

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
        if not isinstance(module, QuantizedLinear) and _tensors(module):
            adapter = "a part of an adapter, which is trained beside the weights" if module in adapters else ""
            reason = adapter or _reason(model, names[0], module)
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


def kind_of(module: nn.Module) -> Kind | None:
    """How a module holds weights that can be quantized; None if it holds none."""
    return next((kind for kind in KINDS if kind.fits(module)), None)


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


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    own = dict(module.named_parameters(recurse=False))
    if "weight" not in own and module._buffers.get("weight") is not None:
        own["weight"] = module._buffers["weight"]  # a frozen one
    return own


def _reason(model: nn.Module, name: str, module: nn.Module) -> str:
    """Why the weights of a module cannot be quantized; "" if they can."""
    made, kind = type(module).__name__, kind_of(module)
    if (kind is not None or isinstance(module, nn.Embedding)) and (reader := _reader(model, name)):
        return f"{reader} computes with its weight itself; only plain calls are quantized"
    if kind is not None:
        return ""
    if isinstance(module, nn.Embedding):
        return f"a {made}: of embeddings only plain ones and those that scale their rows are quantized"
    if isinstance(module, nn.Linear) and ("weight" not in _tensors(module) or hasattr(module, "parametrizations")):
        return (
            f"a {made} whose weight is computed anew for each call, as pruning and norms of weights do; make it a "
            "plain one first, by prune.remove, remove_weight_norm or remove_parametrizations"
        )
    if all(weight.dim() < 2 for weight in _tensors(module).values()):
        return "a norm: a vector, too small to matter"
    return f"a {made}: only plain nn.Linear, GPT-2's Conv1D and experts as transformers holds them are quantized"


def _reader(model: nn.Module, name: str) -> str | None:
    """The class of the module around a layer if its code reads the layer's weight."""
    path, _, leaf = name.rpartition(".")
    around = model.get_submodule(path)
    if getattr(around, "slow_but_exact", None) is False:  # Bloom reads weights only where that is set
        return None
    return type(around).__name__ if name and leaf in _weights_read_by(type(around)) else None


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
