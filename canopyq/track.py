"""A progress bar for anything that takes longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items``; after two seconds a bar with an estimate of what is left appears on stderr."""
    yield from tqdm(items, desc=what, total=total, delay=2, leave=False, dynamic_ncols=True)
