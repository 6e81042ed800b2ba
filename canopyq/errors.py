"""The one exception type of the package, and the wording its messages share."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CanopyError(ValueError):
    """A mistake that the caller can mend. The message is one line: what was given, and the cure."""


def unknown(kind: str, given: object, known: Iterable[str], *, more: str = "") -> CanopyError:
    """An error for a name that does not exist, with the nearest names that do.

    ``unknown("format", "int44", ["int4", "int8"])`` reads
    ``unknown format 'int44'; did you mean 'int4'? known: int4, int8``.
    """
    names = list(known)
    return CanopyError(f"unknown {kind} {given!r}{did_you_mean(given, names) or ';'} known: {', '.join(names)}{more}")


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """``"; did you mean 'int4'?"`` with the nearest names that exist; empty if none is near."""
    near = get_close_matches(str(given).lower(), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
