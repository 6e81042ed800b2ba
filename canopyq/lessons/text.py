"""Lesson text to HTML: everything is escaped first, then a small piece of markdown is honoured."""

from __future__ import annotations

import html
import re

_CODE = '<code style="background:rgba(110,118,129,.16);padding:1px 5px;border-radius:4px">\\1</code>'


def inline(text: str) -> str:
    """One run of text: escaped, then `code`, **bold** and *italic*."""
    pieces = re.split(r"(`[^`]+`)", html.escape(text, quote=True))
    for i, piece in enumerate(pieces):
        if piece.startswith("`") and piece.endswith("`") and len(piece) > 2:
            pieces[i] = re.sub(r"^`(.+)`$", _CODE, piece, flags=re.S)
        else:
            piece = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", piece, flags=re.S)
            pieces[i] = re.sub(r"(?<![\w*])\*([^\s*](?:[^*]*[^\s*])?)\*(?![\w*])", r"<i>\1</i>", piece)
    return "".join(pieces)


def block(text: str) -> str:
    """Paragraphs parted by blank lines; lines that begin with ``- `` make a list, indented by four a code block."""
    return "".join(_paragraph(chunk) for chunk in re.split(r"\n\s*\n", text.strip("\n")) if chunk.strip())


def _paragraph(chunk: str) -> str:
    lines = chunk.splitlines()
    if all(line.startswith("    ") for line in lines):
        return pre("\n".join(line[4:] for line in lines))
    if all(line.startswith(("- ", "  ")) for line in lines):
        items = re.split(r"^- ", chunk, flags=re.M)[1:]
        points = "".join(f"<li>{inline(item.strip())}</li>" for item in items)
        return f'<ul style="margin:4px 0 8px;padding-left:22px">{points}</ul>'
    return f'<p style="margin:4px 0 8px">{inline(" ".join(line.strip() for line in lines))}</p>'


def pre(code: str) -> str:
    """Source code as it stands."""
    style = (
        "background:#f6f8fa;color:#1f2328;padding:8px 12px;border-radius:6px;border:1px solid #d1d9e0;"
        "line-height:1.45;font-size:13px;white-space:pre-wrap;margin:6px 0"
    )
    return f'<pre style="{style}">{html.escape(code.rstrip())}</pre>'


def plain(text: str) -> str:
    """The text without its marks, on one line: for labels and ``text/plain``."""
    text = re.sub(r"`([^`]+)`", r"\1", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text, flags=re.S)
    return " ".join(text.split())


def shorten(text: str, width: int = 72) -> str:
    """``plain`` text cut at a word so that it fits on a line."""
    text = plain(text)
    return text if len(text) <= width else text[:width].rsplit(" ", 1)[0].rstrip(" ,;:.") + " ..."
