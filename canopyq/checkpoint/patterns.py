"""Regular expressions of a stranger's config, matched in time that is linear in the names.

`re` tries one way after another, and `(a+)+!` has 2^n of them. Here all ways are walked at once: the positions that a
part of the pattern can have reached, in all names together, are the bits of one integer, and each part maps them to the
positions after it. A pattern of which that takes too many steps is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from canopyq.errors import CanopyError, shown, wrapped

try:  # Python 3.11 and newer
    from re import _constants as sre
    from re import _parser as sre_parse
except ImportError:
    import sre_constants as sre
    import sre_parse

LONGEST = 1000  # characters of a pattern
MOST = 1000  # patterns in a config; a layer that needs its own is named in full
STEPS = 500_000  # that all patterns of a config may take on names of 10^5 letters in all; longer ones cost more each
_CATEGORIES = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    sre.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    sre.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    sre.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)  # which of all ways comes first makes no difference here


def check(pattern: str) -> Sequence:
    """The parts of a regular expression.

    Raises:
        CanopyError: if it is none, is too long, or uses what cannot be matched in linear time (back-references).
    """
    if len(pattern) > LONGEST:
        raise CanopyError(f"the regular expression {shown(pattern)} has {len(pattern):,} characters; name the layers")
    with wrapped(f"{shown(pattern)} is no regular expression that canopyq reads", "name the layers in config.json"):
        parsed = sre_parse.parse(pattern)
        _check(parsed)
    if parsed.state.flags & ~sre.SRE_FLAG_UNICODE:
        raise CanopyError(
            f"the regular expression {shown(pattern)} sets flags, which canopyq does not read; leave them"
        )
    return parsed


def matching(patterns: Iterable[str], names: Sequence[str]) -> dict[str, set[str]]:
    """Pattern -> the names that begin with a match of it, as `re.match` has it.

    Args:
        patterns: regular expressions, without ``re:``.
        names: printable texts.

    Raises:
        CanopyError: for patterns that `check` refuses, or that take too many steps on these names.
    """
    patterns = list(dict.fromkeys(patterns))
    if len(patterns) > MOST:
        raise CanopyError(f"config.json has {len(patterns):,} regular expressions; name the layers in full instead")
    parsed = {pattern: check(pattern) for pattern in patterns}
    if not names or not patterns:
        return {pattern: set() for pattern in patterns}
    text = _Text(names)
    return {pattern: text.names_at(text.walk(parts, text.starts)) for pattern, parts in parsed.items()}


def _check(parts: Iterable) -> None:
    for op, argument in parts:
        if op in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            continue
        if op in _REPEATS:
            _check(argument[2])
        elif op is sre.SUBPATTERN and not argument[1] and not argument[2]:
            _check(argument[3])
        elif op is sre.BRANCH:
            for branch in argument[1]:
                _check(branch)
        elif op in (sre.ASSERT, sre.ASSERT_NOT):
            _check(argument[1])
        elif op is not sre.AT:
            what = "group with flags" if op is sre.SUBPATTERN else str(op).lower()
            raise NotImplementedError(f"a {what} is not read")


class _Text:
    """All names behind one another. Bit i of an integer stands for position i; each name has one for each of its
    letters, before which it lies, and one for its end."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        joined = "\n".join(names) + "\n"
        self.letters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        lengths = np.fromiter((len(name) + 1 for name in names), np.int64, len(names))
        self.first = np.cumsum(lengths) - lengths
        self.alphabet = set(joined) - {"\n"}
        self.all = (1 << len(joined)) - 1
        self.starts = self._bits(np.isin(np.arange(len(joined)), self.first, assume_unique=True))
        self.ends = self._bits(self.letters == ord("\n"))
        self.known: dict[str, int] = {}
        self.cost, self.left = 1 + len(joined) // 10**5, STEPS

    def _bits(self, where: np.ndarray) -> int:
        return int.from_bytes(np.packbits(where, bitorder="little").tobytes(), "little")

    def names_at(self, positions: int) -> set[str]:
        """The names in which any of the positions lies."""
        size = len(self.letters)
        where = np.unpackbits(np.frombuffer(positions.to_bytes(size // 8 + 1, "little"), np.uint8), bitorder="little")
        found = np.logical_or.reduceat(where[:size], self.first)
        return {self.names[i] for i in np.flatnonzero(found)}

    def walk(self, parts: Sequence, at: int, back: bool = False) -> int:
        """The positions after ``parts`` of a pattern, from those before them; or the other way round."""
        for part in reversed(parts) if back else parts:
            at = self._step(*part, at, back)
        return at

    def _step(self, op, argument, at: int, back: bool) -> int:
        self.left -= self.cost
        if self.left < 0:
            raise CanopyError("the regular expressions in config.json take too long to match; name the layers in full")
        if not at:
            return 0
        if op in _REPEATS:
            return self._repeat(*argument, at, back)
        if op is sre.SUBPATTERN:
            return self.walk(argument[3], at, back)
        if op is sre.BRANCH:
            found = 0
            for branch in argument[1]:
                found |= self.walk(branch, at, back)
            return found
        if op in (sre.ASSERT, sre.ASSERT_NOT):  # where what is ahead begins, or what is behind ends
            there = self.walk(argument[1], self.all, back=argument[0] > 0)
            return at & (there if op is sre.ASSERT else self.all & ~there)
        if op is sre.AT:
            return at & self._place(argument)
        letters = self._letters(op, argument)
        return (at >> 1) & letters if back else (at & letters) << 1

    def _repeat(self, least: int, most: int, parts: Sequence, at: int, back: bool) -> int:
        for _ in range(least):
            if (after := self.walk(parts, at, back)) == at or not after:
                at = after
                break
            at = after
        new, left = at, most - least if most != sre.MAXREPEAT else -1
        while new and left:
            new = self.walk(parts, new, back) & ~at
            at |= new
            left -= 1
        return at

    def _place(self, kind) -> int:
        if kind in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return self.starts
        if kind in (sre.AT_END, sre.AT_END_STRING):
            return self.ends
        word = self._letters(sre.IN, [(sre.CATEGORY, sre.CATEGORY_WORD)])
        edges = (word ^ (word << 1)) & self.all
        return edges if kind is sre.AT_BOUNDARY else self.all & ~edges

    def _letters(self, op, argument) -> int:
        """The positions before which lies a letter that the part of a pattern takes."""
        key = f"{op} {argument}"
        if key not in self.known:
            taken = [ord(c) for c in self.alphabet if _takes(op, argument, c)]
            self.known[key] = self._bits(np.isin(self.letters, np.array(taken, np.uint32)))
        return self.known[key]


def _takes(op, argument, letter: str) -> bool:
    if op is sre.ANY:
        return True
    if op in (sre.LITERAL, sre.NOT_LITERAL):
        return (ord(letter) == argument) is (op is sre.LITERAL)
    negated, found = False, False
    for kind, of in argument:
        if kind is sre.NEGATE:
            negated = True
        elif kind is sre.LITERAL:
            found |= ord(letter) == of
        elif kind is sre.RANGE:
            found |= of[0] <= ord(letter) <= of[1]
        else:
            found |= _CATEGORIES[of](letter)
    return found is not negated
