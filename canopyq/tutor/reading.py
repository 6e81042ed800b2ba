"""Reading: a passage of one to five facts about a few things, and questions about it.

A question names a thing and what is asked of it, and the answer is the sentence of the passage that says so. Both are
needed: other sentences speak of the same thing, and others yet say the same of another thing. Freer passages ("In the
cafe, Vera found the purple book. … Where is the book?") stayed near 62 % held-out in a model of this size and training.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from canopyq.tutor.draws import Draft, between, pick, split_of
from canopyq.tutor.world import COLOURS, NAMES, PLACES, THINGS

SENTENCES = {
    "place": "The {thing} is in the {value}.",
    "owner": "The {thing} belongs to {value}.",
    "colour": "The {thing} has a {value} label.",
}
ASKED = {
    "place": "Where is the {thing}?",
    "owner": "Whose is the {thing}?",
    "colour": "What colour is the label of the {thing}?",
}
VALUES = {"place": PLACES, "owner": NAMES, "colour": COLOURS}
SIZES = ((1, 2), (3, 3), (4, 5))  # sentences, by level
LONGEST = SIZES[-1][-1]


class Fact(NamedTuple):
    """What one sentence says of a thing."""

    thing: str
    attribute: str
    value: str

    @property
    def sentence(self) -> str:
        return SENTENCES[self.attribute].format(thing=self.thing, value=self.value)

    @property
    def question(self) -> str:
        return ASKED[self.attribute].format(thing=self.thing)


class Passage(NamedTuple):
    """A few facts, no two of them on the same attribute of the same thing."""

    facts: tuple[Fact, ...]

    @property
    def text(self) -> str:
        return " ".join(fact.sentence for fact in self.facts)

    @property
    def things(self) -> set[str]:
        return {fact.thing for fact in self.facts}

    def ask(self, rng: Random) -> tuple[str, str]:
        """A question about one of the facts, and its answer."""
        fact = pick(rng, self.facts)
        return fact.question, fact.sentence


def draw_passage(rng: Random, level: int, things: Sequence[str] = THINGS) -> Passage:
    """A passage of the level's length about two or three of the ``things``."""
    size = between(rng, *SIZES[level])
    chosen = rng.sample(things, 2 if size < 4 else 3)
    pairs = rng.sample([(thing, attribute) for thing in chosen for attribute in SENTENCES], size)
    return Passage(tuple(Fact(thing, attribute, pick(rng, VALUES[attribute])) for thing, attribute in pairs))


def first_question(rng: Random, passage: Passage) -> Draft:
    """The turn that gives the passage and asks about it. The passage is what is held out, with all questions on it."""
    question, answer = passage.ask(rng)
    key = ("reading", passage.text)
    return Draft(key, split_of(key), f"{passage.text} {question}", answer)


def read(rng: Random, level: int) -> Draft:
    """The first question about a new passage."""
    return first_question(rng, draw_passage(rng, level))
