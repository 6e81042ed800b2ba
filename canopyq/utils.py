"""What many rooms share: a progress bar, and results that a notebook shows as they are printed."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items``; after two seconds a bar with an estimate of what is left appears.

    It goes to stderr, but in a notebook to stdout: there stderr has a red ground, which would stay after the bar.
    """
    notebook = type(sys.stderr).__module__.startswith("ipykernel")
    file = sys.stdout if notebook else sys.stderr
    yield from tqdm(items, desc=what, total=total, delay=2, leave=False, dynamic_ncols=True, file=file)


class Preformatted:
    """A notebook shows an object of this kind as ``print`` does: its ``str``, in letters of equal width."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
