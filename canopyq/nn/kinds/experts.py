"""Modules with the weights of all experts of a layer; what takes their place is in `nn/experts.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from inspect import signature

import torch.nn.functional as F
from torch import Tensor, nn

from canopyq.nn.experts import (
    QuantizedExperts,
    QuantizedParallelExperts,
    QuantizedSortedExperts,
    QuantizedStackedExperts,
)
from canopyq.nn.kinds.base import Kind


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
        yield [part for part in (f"{number}.gate_proj", f"{number}.up_proj") if part in parts], x, token
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


class StackedExperts(Kind):
    """DBRX's: ``w1``, ``v1`` and ``w2`` (experts · intermediate, hidden) of all experts behind one another, the last
    one transposed."""

    is_linear = False
    unwatched = "nothing says which tokens its experts get"

    def fits(self, module: nn.Module) -> bool:
        return type(module).__name__ == "DbrxExpertGLU"

    def split(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        found = {}
        for i in range(module.moe_num_experts):
            for name, tensor in tensors.items():
                weight = tensor.reshape(module.moe_num_experts, -1, tensor.shape[-1])[i]
                found[f"{i}.{name}"] = (name, weight.t() if name == "w2" else weight)
        return found

    def parted(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(tensors, (module.moe_num_experts, 1))

    def biases(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def inputs(
        self, module: nn.Module, given: list, parts: Collection[str]
    ) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
        return iter(())

    def replacement(self, module: nn.Module, layers: list[nn.Module]) -> nn.Module:
        names = list(dict(module.named_parameters(recurse=False)))
        groups = [layers[i : i + len(names)] for i in range(0, len(layers), len(names))]
        return QuantizedStackedExperts([dict(zip(names, own, strict=True)) for own in groups], module.activation_fn)
