"""One part of a model run alone, on what the model gave it, and all that goes through its layers on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from canopyq.nn.sites import Holder, weight_holders

Group = tuple[str, str]  # a module, and a projection of the experts in it; "" elsewhere


class Trial:
    """A block, or the whole model, with the arguments of one call.

    Attributes:
        names: the layers of each group, after `watched`: one, or the experts of a projection.
        silent: modules with weights that did not run then.
    """

    def __init__(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.block, self.args, self.kwargs = block, args, kwargs
        self.names: dict[Group, list[str]] = {}
        self.silent: list[str] = []
        self._dtype: torch.dtype | None = None

    def run(self) -> list[Tensor]:
        """All that the block puts out, and what it left in its arguments."""
        args, kwargs = _copied(self.args, self._dtype), _copied(self.kwargs, self._dtype)
        return _tensors((self.block(*args, **kwargs), args, kwargs))

    def watched(self) -> tuple[list[Tensor], dict[Group, Tensor], dict[str, Tensor]]:
        """What the block puts out, what went into each group of linear layers (rows, K), and what came out of each
        norm (rows, channels)."""
        given: dict[Group, list[Tensor]] = {}
        gave: dict[str, list[Tensor]] = {}
        self.names, handles, holders = {}, [], weight_holders(self.block)
        self.silent = [holder.name for holder in holders if holder.sites and holder.kind.multiplies]
        for holder in holders:
            for site in holder.sites:
                self.names.setdefault((holder.name, site.part.rpartition(".")[2]), []).append(site.name)
            handles.append(holder.module.register_forward_pre_hook(self._hook(holder, given), with_kwargs=True))
            if is_norm(holder.module):
                handles.append(holder.module.register_forward_hook(_keeper(holder, gave)))
        try:
            output = self.run()
        finally:
            for handle in handles:
                handle.remove()
        return output, {g: torch.cat(x) for g, x in given.items()}, {n: torch.cat(y) for n, y in gave.items()}

    def _hook(self, holder: Holder, given: dict[Group, list[Tensor]]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            values = [*args, *kwargs.values()]
            if holder.name in self.silent:
                self.silent.remove(holder.name)
            if not holder.sites:
                weight, x = getattr(module, "weight", None), next(iter(values), None)
                if isinstance(weight, Tensor) and weight.dim() == 2 and isinstance(x, Tensor) and x.dim():
                    self.names[holder.name, ""] = [holder.name]
                    put((holder.name, ""), x)
                return
            parts = [site.part for site in holder.sites]
            for own, x, _ in holder.kind.inputs(module, values, parts) if holder.kind.multiplies else ():
                for part in own:
                    put((holder.name, part.rpartition(".")[2]), x)

        def put(group: Group, x: Tensor) -> None:
            given.setdefault(group, []).append(x.reshape(-1, x.shape[-1]).clone())

        return hook

    def tensors(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Layer -> its weight (N, K) and bias, as views; a norm -> its gain and bias."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for holder in weight_holders(self.block):
            found |= {site.name: (site.weight, site.bias()) for site in holder.sites}
            if not holder.sites and "weight" in holder.tensors:
                found[holder.name] = (holder.tensors["weight"], holder.tensors.get("bias"))
        return found

    @contextmanager
    def in_dtype(self, dtype: torch.dtype) -> Iterator[None]:
        """The block's weights in another dtype for a while; then they are again what they were, whatever was done."""
        tensors = [*self.block.parameters(), *self.block.buffers()]
        before = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
        experts = {id(m.config): m.config for m in self.block.modules() if hasattr(m, "config")}
        how = [(c, c._experts_implementation) for c in experts.values() if hasattr(c, "_experts_implementation")]
        try:
            self._dtype = dtype
            for tensor, data in before:
                tensor.data = data.to(dtype)
            for config, _ in how:
                config._experts_implementation = "eager"  # the others know no float64
            yield
        finally:
            self._dtype = None
            for tensor, data in before:
                tensor.data = data
            for config, implementation in how:
                config._experts_implementation = implementation


def reads(x: Tensor, y: Tensor) -> bool:
    """Whether every row of x is one of y's."""
    return len(x) > 0 and x.shape[1] == y.shape[1] and all(bool((y == row).all(1).any()) for row in x)


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _keeper(holder: Holder, gave: dict[str, list[Tensor]]) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape[-1:] == module.weight.shape:
            gave.setdefault(holder.name, []).append(output.reshape(-1, output.shape[-1]).clone())

    return hook


def _copied(value: Any, dtype: torch.dtype | None) -> Any:
    """A copy of arguments, numbers in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if dtype and value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {key: _copied(part, dtype) for key, part in value.items()}
    return type(value)(_copied(part, dtype) for part in value) if type(value) in (list, tuple) else value


def _tensors(value: Any) -> list[Tensor]:
    """All tensors with numbers in it."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
