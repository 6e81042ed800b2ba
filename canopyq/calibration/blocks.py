"""Running a model one decoder block at a time, by the model's own code.

To run block i, the whole model is called with the blocks before it replaced by the outputs that the last of them gave,
and stopped once block i is done. So masks, position embeddings and whatever else an architecture passes to its blocks
are made by the architecture itself, at the cost of the embedding, and nothing has to be known of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from canopyq.calibration.data import Batch
from canopyq.errors import CanopyError, one_line
from canopyq.nn.offload import input_device

PROBE = 8  # tokens on which running by blocks is compared with running whole


class _Stop(Exception):
    """Nothing after this block is needed."""


class Blocks:
    """The decoder blocks of a model: the list of modules called ``name``."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __len__(self) -> int:
        return len(self._all())

    def names(self) -> list[str]:
        return [f"{self.name}.{i}" for i in range(len(self))]

    def run(self, batch: Batch, number: int, entering: Any) -> Any:
        """What block ``number`` puts out for a batch, given what the block before it put out (None for the first)."""
        found = []

        def stop_after(forward: Callable) -> Callable:
            def run(*args: Any, **kwargs: Any) -> None:
                found.append(forward(*args, **kwargs))
                raise _Stop

            return run

        blocks = self._all()
        stand_ins = dict.fromkeys(blocks[:number], lambda *args, **kwargs: entering)
        stand_ins[blocks[number]] = stop_after(blocks[number].forward)
        with _forwards(stand_ins):
            try:
                call(self.model, batch)
            except _Stop:
                return found[0]
        raise AssertionError(f"{self.name}.{number} was not called")  # the probe saw that it is

    def run_rest(self, batch: Batch, leaving: Any) -> None:
        """Everything but the blocks, given what the last of them put out."""
        with _forwards(dict.fromkeys(self._all(), lambda *args, **kwargs: leaving)):
            call(self.model, batch)

    def work_on(self, batch: Batch) -> bool:
        """Whether running by blocks gives what the whole model gives, tried on a few tokens."""
        probe, whole, order = batch, {}, []
        if not batch.more:
            row = int(batch.real.any(1).int().argmax())
            ids = batch.ids[row][batch.real[row]][None, :PROBE]
            probe = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
        blocks = self._all()
        if len(set(blocks)) != len(blocks):
            return False

        def remember(number: int) -> Callable:
            def hook(module: nn.Module, given: tuple, output: Any) -> None:
                order.append(number)
                whole[number] = output

            return hook

        handles = [block.register_forward_hook(remember(number)) for number, block in enumerate(blocks)]
        try:
            call(self.model, probe)
        finally:
            for handle in handles:
                handle.remove()
        if order != list(range(len(blocks))):
            return False
        entering = None
        for number in order:
            try:
                entering = self.run(probe, number, entering)
            except CanopyError:  # such as a block that takes what an earlier one has left beside its output
                return False
            one, other = _hidden(entering), _hidden(whole[number])
            if one is None or other is None or one.shape != other.shape:
                return False
            if not torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
                return False
        return True

    def _all(self) -> list[nn.Module]:
        """Looked up each time: they may have been replaced."""
        return list(self.model.get_submodule(self.name))


def find_blocks(model: nn.Module, layers: Collection[str], batch: Batch) -> Blocks | None:
    """The outermost list of modules that holds most of ``layers``, if the model can be run by it; else None."""
    lists = {name: module for name, module in model.named_modules() if type(module) is nn.ModuleList}
    held = {name: sum(layer.startswith(f"{name}.") for layer in layers) for name in lists}
    best = max(held, key=lambda name: held[name], default=None)  # of equals the outermost, which comes first
    if best is None or not held[best]:
        return None
    blocks = Blocks(model, best)
    return blocks if blocks.work_on(batch) else None


def call(model: nn.Module, batch: Batch) -> None:
    """Run the model on a batch; only what its hooks see matters.

    Raises:
        CanopyError: if the model cannot be called so.
    """
    device = input_device(model)
    taken = signature(model.forward).parameters
    any_name = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken.values())
    given = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.arguments.items()}
    try:
        if "input_ids" not in taken and not any_name:
            model(given["input_ids"])
        elif "use_cache" in taken or any_name:
            model(**given, use_cache=False)
        else:
            model(**given)
    except (_Stop, CanopyError):
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CanopyError(
            f"{type(model).__name__} does not run on the calibration data: {one_line(error)}; give batches of all that "
            "it takes, by name"
        ) from None


@contextmanager
def _forwards(stand_ins: dict[nn.Module, Callable]) -> Iterator[None]:
    """Other ``forward`` functions for a while. Some tools set one on the module itself, and get it back."""
    before = {module: module.__dict__.get("forward") for module in stand_ins}
    try:
        for module, forward in stand_ins.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _hidden(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None
