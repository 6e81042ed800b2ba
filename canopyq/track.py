"""A progress bar for anything that takes longer than two seconds."""

from __future__ import annotations

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
