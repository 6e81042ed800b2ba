"""Skills about letters: spelling a word, reversing and counting in a row of letters."""

from __future__ import annotations

from random import Random

from canopyq.tutor.draws import Draft, between, pick, split_of, split_of_phrasing
from canopyq.tutor.world import WORDS

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
SPELL = (
    "Spell {word}.",
    "How do you spell {word}?",
    "Write {word} letter by letter.",
    "Can you spell {word} for me?",
    "Which letters make up {word}?",
    "Split {word} into letters.",
)
REVERSE = ("Reverse {letters}.", "Write {letters} backwards.")
COUNT = ("How many times is {letter} in {letters}?", "Count the letter {letter} in {letters}.")


def _row(rng: Random, length: int, distinct: int) -> list[str]:
    """A row of random letters that uses at most ``distinct`` different ones, so that letters repeat."""
    alphabet = rng.sample(ALPHABET, distinct)
    return [pick(rng, alphabet) for _ in range(length)]


def spell(rng: Random, level: int) -> Draft:
    """The words are a fixed list: only the phrasing is held out. There is one level."""
    word = pick(rng, WORDS)
    index = int(rng.random() * len(SPELL))
    split = split_of_phrasing(("spell", word), index, len(SPELL))
    return Draft(("spell", word, index), split, SPELL[index].format(word=word), "-".join(word) + ".")


def reverse(rng: Random, level: int) -> Draft:
    """One row in five is a real word, the others are random letters."""
    row = list(pick(rng, WORDS)) if rng.random() < 0.2 else _row(rng, between(rng, *((3, 4), (5, 6), (7, 9))[level]), 8)
    key = ("reverse", *row)
    return Draft(key, split_of(key), pick(rng, REVERSE).format(letters="-".join(row)), "-".join(reversed(row)) + ".")


def count(rng: Random, level: int) -> Draft:
    """Mostly a letter that is in the row; now and then any letter, so that the answer can be 0."""
    row = _row(rng, between(rng, *((3, 5), (6, 8), (9, 12))[level]), 3)
    letter = pick(rng, row) if rng.random() < 0.85 else pick(rng, ALPHABET)
    key = ("count", letter, *row)
    question = pick(rng, COUNT).format(letter=letter, letters="-".join(row))
    return Draft(key, split_of(key), question, f"{row.count(letter)}.")
