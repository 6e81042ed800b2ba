"""Recall: a student tells a few facts about themselves, chats about other things, then asks for one of the facts.

This is the skill that reads far back in the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from canopyq.tutor.draws import between, pick, split_of
from canopyq.tutor.world import ANIMALS, COLOURS, DAYS, NAMES, PLACES

Exchange = tuple[str, str]  # what the student says, what the tutor answers


def _digits(count: int) -> Callable[[Random], str]:
    return lambda rng: str(between(rng, 10 ** (count - 1), 10**count - 1))


def _one_of(options: tuple[str, ...]) -> Callable[[Random], str]:
    return lambda rng: pick(rng, options)


def _room(rng: Random) -> str:
    return pick(rng, "ABCDEF") + str(between(rng, 10, 99))


MEMOS: dict[str, Callable[[Random], str]] = {
    "locker code": _digits(4),
    "door code": _digits(4),
    "gym code": _digits(4),
    "bank code": _digits(4),
    "student number": _digits(4),
    "phone number": _digits(6),
    "library card": _digits(6),
    "bus line": _digits(2),
    "seat": _digits(2),
    "desk": _digits(2),
    "exam room": _room,
    "study room": _room,
    "dorm room": _room,
    "mailbox": _room,
    "exam day": _one_of(DAYS),
    "club day": _one_of(DAYS),
    "dog's name": _one_of(NAMES),
    "lab partner": _one_of(NAMES),
    "best friend": _one_of(NAMES),
    "tutor": _one_of(NAMES),
    "bike colour": _one_of(COLOURS),
    "favourite colour": _one_of(COLOURS),
    "favourite animal": _one_of(ANIMALS),
    "meeting place": _one_of(PLACES),
}
MEMO_NAMES = tuple(MEMOS)
TELL = ("My {memo} is {value}.", "Please remember: my {memo} is {value}.", "Note that my {memo} is {value}.")
RECALL = ("What is my {memo}?", "Remind me, what is my {memo}?", "I told you my {memo}. What is it?")
NOTED = "Noted."

# How many memos and fillers a recall question of each level has; 50 fillers make a chat of about 1,500 tokens.
LEVELS = (((2, 4), (0, 8)), ((5, 9), (9, 24)), ((10, 14), (25, 50)))


def tell(rng: Random, memo: str, value: str) -> Exchange:
    return pick(rng, TELL).format(memo=memo, value=value), NOTED


def remind(rng: Random, memo: str, value: str) -> Exchange:
    return pick(rng, RECALL).format(memo=memo), f"{value}."


def split_of_recall(told: dict[str, str], asked: str) -> str:
    """A recall question is everything that was told, and which of it is asked."""
    return split_of(("recall", asked, *sorted(told.items())))


def memos_for(fillers: int) -> int:
    """As many memos as go naturally with a chat of that length: 3 with no filler, 14 with 50."""
    return 3 + round(11 * min(fillers, 50) / 50)


def conversation(
    rng: Random, split: str, memos: int, fillers: int, filler: Callable[[Random], Exchange]
) -> tuple[tuple, tuple[Exchange, ...]]:
    """The canonical key and the turns of a chat: tell ``memos`` facts, chat ``fillers`` turns, ask for one fact."""
    while True:
        names = rng.sample(MEMO_NAMES, memos)
        told = {name: MEMOS[name](rng) for name in names}
        asked = pick(rng, names)
        if split_of_recall(told, asked) == split:
            break
    turns = [tell(rng, name, value) for name, value in told.items()]
    turns += [filler(rng) for _ in range(fillers)]
    turns.append(remind(rng, asked, told[asked]))
    return ("recall", asked, *sorted(told.items())), tuple(turns)
