"""``lessons.table(head, rows)``: measured numbers in a table, as HTML and as aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .look import numeric_columns
from .look import table as html_table
from .shown import Fixed
from .text import plain


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Fixed:
    """A table of anything with a ``str``; columns of numbers are flush right."""
    lines = [[str(cell) for cell in row] for row in rows]
    shown = [[plain(cell) for cell in line] for line in [list(head), *lines]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    right = numeric_columns(lines, len(head))
    text = "\n".join(
        "  ".join(f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in shown
    )
    return Fixed(html_table(head, lines), text)
