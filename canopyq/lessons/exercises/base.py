"""What an exercise is made of. The exercises themselves stand in one module a lesson."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Mistake:
    """A classic wrong answer: recognised because the reader's function gives the very numbers that ``source`` gives."""

    name: str
    message: str
    source: str


@dataclass(frozen=True)
class Exercise:
    """A function to write, the inputs it is tried on, and the wrong answers that are known by name.

    Attributes:
        function: the name of the function to write; ``stub``, ``solution`` and every mistake define it.
        stub: the function to begin with: one that raises NotImplementedError, or one with faults that are to be mended.
        parts: names of what it returns, if it returns more than one thing.
        integers: those of the parts that are whole numbers.
        cases: gives the inputs, one tuple of arguments a call; the first ones are the easiest to read.
    """

    id: str
    title: str
    minutes: int
    difficulty: int
    task: str
    function: str
    stub: str
    solution: str
    hints: tuple[str, str, str]
    mistakes: tuple[Mistake, ...]
    cases: Callable[[], list[tuple]]
    parts: tuple[str, ...] = ("result",)
    integers: tuple[str, ...] = field(default=())

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the function's arguments."""
        return tuple(inspect.signature(self.build(self.solution)).parameters)

    def build(self, source: str) -> Callable:
        """The function that a piece of source defines."""
        namespace: dict = {"torch": torch, "math": math}
        exec(compile(source, f"<{self.id}>", "exec"), namespace)  # the course's own text, never the reader's
        return namespace[self.function]


def altered(source: str, *changes: tuple[str, str]) -> str:
    """``source`` with one text put for another: most classic mistakes are one line away from the solution."""
    for old, new in changes:
        if old not in source:
            raise ValueError(f"{old!r} does not occur in the solution")
        source = source.replace(old, new)
    return source


def clear_of_ties(x: torch.Tensor, step: torch.Tensor | float, margin: float = 0.02) -> torch.Tensor:
    """``x`` with the values moved that lie so near the middle between two steps that rounding could go either way.

    The smallest and largest value stay, since they fix the scale.
    """
    fraction = x / step - torch.floor(x / step)
    near = ((fraction - 0.5).abs() < margin) & (x != x.min()) & (x != x.max())
    return torch.where(near, x + 3 * margin * step * torch.where(x > 0, -1, 1), x)


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Normally distributed numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
