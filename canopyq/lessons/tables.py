"""``lessons.table(head, rows)``: measured numbers in a table, as HTML and as aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from .look import table as html_table
from .shown import Fixed
from .text import plain


def table(head: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> Fixed:
    """A table of anything with a ``str``; the first ``left`` columns are flush left, the others flush right."""
    lines = [[str(cell) for cell in row] for row in rows]
    shown = [[plain(cell) for cell in line] for line in [list(head), *lines]]
    widths = [max(len(cell) for cell in column) for column in zip_longest(*shown, fillvalue="")]
    text = "\n".join(
        "  ".join(
            f"{cell:<{w}}" if i < left else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in shown
    )
    return Fixed(html_table(list(head), lines, left), text)
