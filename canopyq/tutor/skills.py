"""All the skills in one table, and how to draw a question from it."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from canopyq import checks
from canopyq.tutor import dates, knowledge, letters, numbers, reading
from canopyq.tutor.draws import Draft


@dataclass(frozen=True)
class Skill:
    """One thing that the tutor model can do."""

    name: str
    draw: Callable[[Random, int], Draft] | None  # None: not one question but a whole chat (recall)
    weight: float  # its share of the training questions, against the others
    about: str
    levels: int = 3
    held_out: str = "question"  # or "phrasing", or what is mixed


SKILLS = {
    skill.name: skill
    for skill in (
        Skill("add", numbers.add, 2.0, "sums of two numbers up to 9999"),
        Skill("subtract", numbers.subtract, 2.0, "differences of two numbers up to 9999"),
        Skill(
            "multiply",
            numbers.multiply,
            2.0,
            "one digit times up to three digits",
            held_out="question; for the times tables (level 0) only the phrasing",
        ),
        Skill("convert", numbers.convert, 1.0, "units, such as 3 km in m"),
        Skill("compare", numbers.compare, 1.0, "the largest or smallest of 2 to 6 numbers"),
        Skill("sort", numbers.sort, 1.3, "3 to 7 numbers in increasing order"),
        Skill("sequence", numbers.sequence, 1.5, "the next number of an arithmetic sequence"),
        Skill("model_size", numbers.model_size, 1.2, "the memory that a model's weights take in a format"),
        Skill(
            "weekday",
            dates.weekday,
            1.5,
            "the day of the week up to 90 days away",
            held_out="question; for fewer than 7 days only the phrasing",
        ),
        Skill("date", dates.date, 1.3, "the date up to 20 days later"),
        Skill("spell", letters.spell, 0.8, "a known word, letter by letter", levels=1, held_out="phrasing"),
        Skill("reverse", letters.reverse, 1.0, "3 to 9 letters backwards"),
        Skill("count", letters.count, 1.0, "one letter among 3 to 12"),
        Skill("facts", knowledge.fact, 1.5, "room, day, teacher or credits of a course", levels=1, held_out="phrasing"),
        Skill("glossary", knowledge.define, 0.4, "24 terms of quantization", levels=1, held_out="phrasing"),
        Skill("reading", reading.read, 4.0, "the sentence of a short passage that answers a question"),
        Skill(
            "recall",
            None,
            0.0,
            "a fact told earlier in a chat, 0 to 50 turns ago",
            held_out="the whole chat",
        ),
    )
}
SINGLE_TURN = tuple(name for name, skill in SKILLS.items() if skill.draw is not None)
LEVEL_SHARES = (0.2, 0.35, 0.45)  # of the training questions
_CUMULATIVE = tuple(accumulate(SKILLS[name].weight for name in SINGLE_TURN))


def find(name: str) -> Skill:
    """The skill of that name."""
    return SKILLS[checks.choice("skill", name, SKILLS)]


def draw_skill(rng: Random) -> str:
    """A skill other than recall, by weight."""
    return SINGLE_TURN[bisect(_CUMULATIVE, rng.random() * _CUMULATIVE[-1])]


def draw_level(rng: Random) -> int:
    """A level as training mixes them."""
    share = rng.random()
    if share < LEVEL_SHARES[0]:
        return 0
    return 1 if share < LEVEL_SHARES[0] + LEVEL_SHARES[1] else 2


def draw(rng: Random, split: str, name: str, level: int) -> Draft:
    """A question of that split: drawn again until one falls into it."""
    function = SKILLS[name].draw
    assert function is not None, f"{name} is a chat, not a question"
    while True:
        draft = function(rng, level)
        if draft.split == split:
            return draft
