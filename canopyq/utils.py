"""What many rooms share: a progress bar, models in evaluation mode for a while, and results that a notebook shows as
they are printed."""

from __future__ import annotations

import html
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
EVERY = 10.0  # seconds between two lines of a log


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items``; after two seconds a bar with an estimate of what is left appears.

    It goes to stderr, but in a notebook to stdout: there stderr has a red ground, which would stay after the bar. Where
    stderr is no terminal but a log, a line is written every `EVERY` seconds. Where ``TQDM_DISABLE`` is set, tqdm's own
    variable, neither comes.
    """
    if type(sys.stderr).__module__.startswith("ipykernel"):
        file = sys.stdout
    elif sys.stderr is None or not sys.stderr.isatty():
        yield from _logged(items, what, total)
        return
    else:
        file = sys.stderr
    yield from tqdm(items, desc=what, total=total, delay=2, leave=False, dynamic_ncols=True, file=file)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """The bar of `track` for work that is no loop: a function to call after each of ``total`` steps."""
    steps = track(range(total), what, total)
    next(steps, None)
    try:
        yield lambda: next(steps, None)
    finally:
        steps.close()


def _logged(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    total = len(items) if total is None and isinstance(items, Sized) else total
    start = last = time.monotonic()
    for count, item in enumerate(items):
        now = time.monotonic()
        if now - last >= EVERY and sys.stderr is not None and not os.environ.get("TQDM_DISABLE"):
            last = now
            of = "" if total is None else f" of {total}"
            print(f"{what}: {count}{of} done, {now - start:.0f} s", file=sys.stderr, flush=True)
        yield item


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """No dropout; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Preformatted:
    """A notebook shows an object of this kind as ``print`` does: its ``str``, in letters of equal width."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
