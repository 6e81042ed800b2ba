"""Drawing from a random stream, what one drawn question is, and which questions are held out.

A question's split follows from a hash of its canonical form, so it needs no list and never changes: 2 of 20 hash values
are the test split, 1 is the validation split, 17 train. "7 + 5" and "5 + 7" share one canonical form, and so one split.

Some skills ask about a fixed list of items (the teacher of a course, the spelling of a word). An item that was never
trained on cannot be known, so there only the *phrasing* is held out: each item keeps two of its phrasings for the test
split and one for the validation split. Which ones differs from item to item, and at least two are left to train on.

``random.Random.randint`` and ``choice`` are slow, and a training run draws some 15 million questions with several
numbers each, so two short functions stand in for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from random import Random
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")
SPLITS = ("train", "val", "test")
TEST_PHRASINGS = 2
VAL_PHRASINGS = 1
FEWEST_PHRASINGS = TEST_PHRASINGS + VAL_PHRASINGS + 2


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


def _hash(key: tuple) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=4).digest(), "big")


def split_of(key: tuple) -> str:
    """The split of a canonical question."""
    value = _hash(key) % 20
    if value < 2:
        return "test"
    return "val" if value == 2 else "train"


def split_of_phrasing(item: tuple, index: int, count: int) -> str:
    """The split of phrasing number ``index`` out of ``count`` for one item.

    The hash of the item says where its test phrasings start; the others follow in a circle.
    """
    if count < FEWEST_PHRASINGS:
        raise ValueError(f"{item[0]} has {count} phrasings; at least {FEWEST_PHRASINGS} are needed to hold some out")
    place = (index - _hash(item)) % count
    if place < TEST_PHRASINGS:
        return "test"
    return "val" if place < TEST_PHRASINGS + VAL_PHRASINGS else "train"
