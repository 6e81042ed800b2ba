"""Drawing from a random stream, and what one drawn question is.

``random.Random.randint`` and ``choice`` are slow, and a training run draws some 15 million questions with several
numbers each, so two short functions stand in for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Draft(NamedTuple):
    """One question as a skill draws it, before anyone has asked which split it belongs to."""

    key: tuple  # the canonical question: two drafts with one key ask the same thing
    split: str  # "train", "val" or "test"
    question: str
    answer: str


def between(rng: Random, low: int, high: int) -> int:
    """An integer from ``low`` to ``high``, both included."""
    return low + int(rng.random() * (high - low + 1))


def pick(rng: Random, options: Sequence[Item]) -> Item:
    """One of the options, each as likely as the others."""
    return options[int(rng.random() * len(options))]
