"""The one exception type of the package, and the wording its messages share."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

MOST = 80  # characters of a value that a message quotes
LONGEST = 1000  # characters of a message
_LONG_WORD = re.compile(r"\S{201,}")  # no path that anybody types: a name made to fill the screen


class CanopyError(ValueError):
    """A mistake that the caller can mend. The message is one line: what was given, and the cure.

    Line breaks and control characters, which a name or a file may bring in, are written as escapes, and what is endless
    is cut.
    """

    def __init__(self, message: str) -> None:
        message = _LONG_WORD.sub(lambda word: cut(word.group()), printable(message))
        super().__init__(cut(message, LONGEST))


def cut(text: str, most: int = MOST) -> str:
    """``text`` if it has at most ``most`` characters, else so much of it, which ``…`` ends."""
    return text if len(text) <= most else text[: most - 1] + "…"


def printable(text: str) -> str:
    """``text`` in one line that any terminal may show: what is not printable is written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """How a message quotes a value, in at most some 80 characters: text and numbers as Python writes them, a tensor by
    its dtype and shape, a type by its name, anything else by its kind."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write thousands of digits
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        text = repr(value[: MOST + 1])
    elif value is None or isinstance(value, (int, float, complex)):
        text = repr(value)
    elif isinstance(value, type):
        text = value.__name__
    elif type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        text = str(value)
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        text = f"a {value.dtype} tensor {tuple(value.shape)}"
    elif isinstance(value, (list, tuple, set, dict)):
        few = isinstance(value, (list, tuple)) and len(value) <= 6
        plain = few and all(isinstance(x, (str, float)) or (type(x) is int and abs(x) < 10**9) for x in value)
        text = reprlib.repr(value) if plain else f"{_a(value)} of {len(value)}"
    else:
        text = _a(value)
    return cut(printable(text), MOST + 2)


def _a(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def unknown(kind: str, given: object, known: Iterable[str], *, more: str = "") -> CanopyError:
    """An error for a name that does not exist, with the nearest names that do.

    ``unknown("format", "int44", ["int4", "int8"])`` reads
    ``unknown format 'int44'; did you mean 'int4'? known: int4, int8``.
    """
    names = list(known)
    hint = did_you_mean(given, names) or ";"
    return CanopyError(f"unknown {kind} {shown(given)}{hint} known: {', '.join(names)}{more}")


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """``"; did you mean 'int4'?"`` with the nearest names that exist; empty if none is near."""
    text = (given[:MOST] if isinstance(given, str) else shown(given)).lower()
    near = get_close_matches(text, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def one_line(error: BaseException) -> str:
    """What another library's exception says, on one line of at most 160 characters; its type, if it says nothing."""
    return cut(" ".join(map(cut, str(error).split())) or type(error).__name__, 160)


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Put ``prefix`` before the message of any `CanopyError`: the layer or file that it is about."""
    try:
        yield
    except CanopyError as error:
        raise CanopyError(f"{prefix}{error}") from None


@contextmanager
def wrapped(what: str, cure: str = "", *kinds: type[BaseException]) -> Iterator[None]:
    """Let another library or the system refuse, and say so in one line: ``"what (its message); cure"``.

    Args:
        kinds: of exceptions; any if none is named. A `CanopyError` says enough itself.
    """
    try:
        yield
    except CanopyError:
        raise
    except Exception as error:
        if kinds and not isinstance(error, kinds):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise CanopyError(f"{what} ({reason})" + (f"; {cure}" if cure else "")) from error


def and_more(names: Sequence[str]) -> str:
    """The first name, and how many others there are: ``"lm_head and 3 more"``."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Names with their reasons, one line a reason: ``"lm_head and 3 more (too small)"``."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{and_more(group)} ({reason})" for reason, group in names.items()]
