"""Where a model holds weights that can be quantized: linear layers, GPT-2's Conv1D, embeddings, experts, the head.

This is the one inventory: quantizing, calibrating, saving, loading and disk to disk all go through it. A `Kind` says
how one kind of module holds its weights, what goes into each of them, and what takes the module's place. An
architecture that holds them otherwise is one more kind here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import getsource, isfunction, signature

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from canopyq.errors import CanopyError
from canopyq.nn.embedding import QuantizedEmbedding
from canopyq.nn.experts import QuantizedExperts
from canopyq.nn.linear import QuantizedLinear
from canopyq.nn.offload import is_away, values


class Kind:
    """How one kind of module holds weights (out_features, in_features).

    Attributes:
        is_linear: a call of the module is x · Wᵀ + b, with one weight.
        multiplies: what goes in are activations, and not token ids.
        transposed: the module, and the files, have the weight as (in_features, out_features).
        config_class: what a ``quantization_config`` calls layers of this kind.
    """

    is_linear = True
    multiplies = True
    transposed = False
    config_class = "Linear"

    def fits(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        raise NotImplementedError

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        """Part -> the tensor in which it lies, and its weight (out_features, in_features), a view of that tensor.

        Args:
            tensors: the module's own, by name.
        """
        return {"": ("weight", tensors["weight"])}

    def parted(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
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

    def layer(self, module: nn.Module, *packed) -> QuantizedLinear:
        """A quantized layer for one weight. ``packed``: the arguments of `QuantizedLinear`."""
        return QuantizedLinear(*packed)

    def replacement(self, module: nn.Module, layers: list[nn.Module]) -> nn.Module:
        """What takes the module's place, of its quantized layers in the order of `split`."""
        (layer,) = layers
        return layer


class Linear(Kind):
    """nn.Linear. A subclass may do something else with its weight."""

    def fits(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear


class Conv1D(Kind):
    """GPT-2's: a linear layer with its weight transposed."""

    transposed = True

    def fits(self, module: nn.Module) -> bool:
        return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
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
    """All experts of a layer in two tensors, as transformers has them: ``gate_up_proj`` (experts, 2 · intermediate,
    hidden) and ``down_proj`` (experts, hidden, intermediate)."""

    is_linear = False
    FLAGS = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False,
             "has_post_expert_norm": False}  # fmt: skip

    def fits(self, module: nn.Module) -> bool:
        named = dict(module.named_parameters(recurse=False))
        if set(named) != {"gate_up_proj", "down_proj"} or any(weight.dim() != 3 for weight in named.values()):
            return False
        (experts, both, hidden), gate = named["gate_up_proj"].shape, getattr(type(module), "_apply_gate", None)
        return (
            named["down_proj"].shape == (experts, hidden, both // 2)  # Llama 4 has them the other way round
            and len(signature(module.forward).parameters) >= 3
            and all(getattr(module, flag, value) is value for flag, value in self.FLAGS.items())
            and (gate is None or gate.__module__ == "transformers.integrations.moe")
            and hasattr(module, "act_fn")
        )

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        found = {}
        for i, (gate_up, down) in enumerate(zip(tensors["gate_up_proj"], tensors["down_proj"], strict=True)):
            gate, up = gate_up.chunk(2)
            found |= {f"{i}.gate_proj": ("gate_up_proj", gate), f"{i}.up_proj": ("gate_up_proj", up)}
            found[f"{i}.down_proj"] = ("down_proj", down)
        return found

    def parted(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        experts = len(tensors["down_proj"])
        return {"gate_up_proj": (experts, 2, 1), "down_proj": (experts, 1, 1)}

    def inputs(
        self, module: nn.Module, given: list, parts: Collection[str]
    ) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
        """Each expert sees the tokens that were routed to it; what goes into its last projection is computed here."""
        x, chosen = given[:2]
        for number, gate_up in enumerate(module.gate_up_proj):
            token = (chosen == number).any(-1).nonzero().flatten()
            routed = x[token]
            yield [f"{number}.gate_proj", f"{number}.up_proj"], routed, token
            if f"{number}.down_proj" in parts and len(token):
                gate, up = F.linear(routed, gate_up).chunk(2, dim=-1)
                yield [f"{number}.down_proj"], module.act_fn(gate) * up, token

    def replacement(self, module: nn.Module, layers: list[nn.Module]) -> nn.Module:
        return QuantizedExperts.like(module, layers)


KINDS = (Linear(), Conv1D(), Embedding(), Experts())


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
        return self.kind.split(values(self.module))[self.part][1]

    def bias(self) -> Tensor | None:
        """(out_features,), with its values."""
        return values(self.module).get("bias") if self.kind.is_linear else None


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
        for part, (leaf, weight) in self.kind.split(self.tensors).items():
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
    if not own and isinstance(weight := getattr(module, "weight", None), Tensor):
        own["weight"] = weight  # a frozen one, kept as a buffer
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
    if all(weight.dim() < 2 for weight in _tensors(module).values()):
        return "a norm: a vector, too small to matter"
    return f"a {made}: only plain nn.Linear, GPT-2's Conv1D and fused experts are quantized"


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
