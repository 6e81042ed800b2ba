"""Changing a model step by step so that a failure leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from canopyq.errors import CanopyError


class Transaction:
    """A context in which a model is changed: if it is left by an error, every change is taken back, the last one first.

    Values that are changed are kept twice until the end.

    Args:
        keep: the changes in the end; False takes them back in any case.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._steps: list[Callable[[], None]] = []

    @torch.no_grad()
    def change(self, tensor: Tensor, values: Tensor) -> None:
        """Give ``tensor`` other values, in place.

        Raises:
            CanopyError: for a meta tensor, whose values accelerate keeps elsewhere.
        """
        if tensor.is_meta:
            raise CanopyError(
                "the method changes weights that accelerate keeps elsewhere; load the whole model in memory, or use "
                "gptq, clip or hqq"
            )
        if id(tensor) not in self._values:
            self._values[id(tensor)] = (tensor, tensor.detach().clone())
        tensor.copy_(values)

    def on_failure(self, step: Callable[[], None]) -> None:
        """Call ``step`` if the context is left by an error, after the values are back."""
        self._steps.append(step)

    def __enter__(self) -> Transaction:
        return self

    @torch.no_grad()
    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._keep:
            return
        for tensor, values in reversed(self._values.values()):
            tensor.copy_(values)
        for step in reversed(self._steps):
            step()
