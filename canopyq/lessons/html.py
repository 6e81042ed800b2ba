"""Cards: how they look, and how they show themselves live, as plain HTML and as text.

The HTML helpers use the same colours everywhere, readable on light and dark pages: every coloured box sets both its
background and its ink. A verdict is always a word too, never colour alone.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ipywidgets import HTML, Layout, ToggleButtons, VBox, Widget

from canopyq import checks

from .text import inline, plain

KINDS = {  # background, ink, edge
    "good": ("#e7f5ec", "#0b3d1e", "#2e7d32"),
    "bad": ("#fdeeec", "#5f1410", "#c62828"),
    "note": ("#fff6df", "#4a3500", "#b7791f"),
    "info": ("#eaf2fb", "#0d2c4d", "#1f6feb"),
}
FONT = "line-height:1.5;font-size:14px;max-width:760px"
_BOX = "padding:8px 12px;border-radius:4px;margin:4px 0"


def box(kind: str, body: str) -> str:
    """A coloured box around ready HTML."""
    background, ink, edge = KINDS[kind]
    style = f"background:{background};color:{ink};border-left:4px solid {edge};{_BOX};{FONT}"
    body = body.replace('<code style="', f'<code style="color:{ink};')  # a page's own colour for code may not fit
    return f'<div class="canopyq-box canopyq-{kind}" style="{style}">{body}</div>'


def heading(label: str, title: str, aside: str = "") -> str:
    """The first line of a card: a small label, the title, and something short after it."""
    aside = f'<span style="opacity:.75;font-size:13px"> &nbsp;{html.escape(aside)}</span>' if aside else ""
    return (
        f'<div style="margin:2px 0 6px;line-height:1.4"><span style="font-size:12px;letter-spacing:.06em;'
        f'text-transform:uppercase;opacity:.75">{html.escape(label)}</span> &nbsp;'
        f'<b style="font-size:15px">{inline(title)}</b>{aside}</div>'
    )


def details(summary: str, body: str) -> str:
    """A part that opens on a click, with no kernel and no JavaScript."""
    return f'<details style="margin:4px 0"><summary style="cursor:pointer">{summary}</summary>{body}</details>'


def section(body: str) -> str:
    """The static form of a card."""
    return f'<div style="{FONT};border:1px solid #c9d1d9;border-radius:6px;padding:8px 14px;margin:4px 0">{body}</div>'


def numeric_columns(rows: Sequence[Sequence[str]], width: int) -> list[bool]:
    """Which columns hold numbers only: bare, with a short unit, an interval or an "of", or nothing."""
    number = re.compile(r"([-+]?[\d.,]+(e[-+]?\d+)?(\s?[^\s\d]{1,3})?(\s\(.*\))?(\sof\s\d+)?|-|)")
    return [all(number.fullmatch(row[i]) for row in rows) for i in range(width)]


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str | None = None) -> str:
    """A plain table; columns of numbers are flush right. ``kind`` gives it the ink of the box that it stands in."""
    rows = [[str(cell) for cell in row] for row in rows]
    right = numeric_columns(rows, len(head))
    ink = f"color:{KINDS[kind][1]};background:{KINDS[kind][0]};" if kind else ""

    def cells(row: Sequence[str], tag: str) -> str:
        style = ink + "padding:3px 10px;border-bottom:1px solid rgba(110,118,129,.3);text-align:"
        places = ["right" if flush else "left" for flush in right]
        return "".join(f'<{tag} style="{style}{at}">{inline(c)}</{tag}>' for at, c in zip(places, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        '<table style="border-collapse:collapse;font-size:13px;line-height:1.45;margin:4px 0;background:transparent">'
        f"<thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
    )


def buttons(options: Sequence[str] | Mapping[str, object], value: object = ...) -> ToggleButtons:
    """A row of buttons of which one is pressed, as wide as their labels; the first one unless ``value`` is given."""
    chosen = {} if value is ... else {"value": value}
    return ToggleButtons(
        options=options,
        style={"button_width": "auto"},
        layout=Layout(width="auto", margin="2px 14px 2px 2px"),
        **chosen,
    )


def verdict(body: str = "") -> HTML:
    """Where a card says what it thinks of an answer."""
    place = HTML(body)
    place.add_class("canopyq-verdict")
    return place


def frame(children: Sequence[Widget], *names: str, border: str = "1px solid #c9d1d9") -> VBox:
    """The frame around a live card; ``names`` become CSS classes, so that tests can find it."""
    layout = Layout(border=border, padding="8px 14px", margin="4px 0", max_width="800px", overflow="visible")
    card = VBox([HTML(_STYLE, layout=Layout(display="none")), *children], layout=layout)
    for name in ("canopyq-card", *names):
        card.add_class(name)
    return card


# Choices stand in a column and wrap; the chosen one is framed; what has the keyboard's focus can be seen. Without its
# kernel, after a restart or in a notebook that is opened again, a card says so once and shows no verdict. A measurement
# that waits for a guess keeps back what else its cell and the one before it have put out.
_CSS = """
.canopyq-card .widget-html-content { line-height: 1.5; white-space: normal; }
.canopyq-choices .widget-toggle-button { display: block; width: 100%; height: auto; min-height: 30px; margin: 3px 0;
  padding: 4px 12px; text-align: left; line-height: 1.5; white-space: normal; border: 1px solid rgba(110,118,129,.35);
  border-radius: 6px; box-shadow: none; }
.canopyq-card .widget-toggle-button.mod-active { background: #dcebfb; color: #0d2c4d; border-color: #1f6feb;
  box-shadow: inset 3px 0 0 #1f6feb; }
.canopyq-choices > div { flex-direction: column; width: 100%; }
.canopyq-card button:focus-visible, .canopyq-card .noUi-handle:focus-visible { outline: 2px solid #1f6feb;
  outline-offset: 1px; }
.canopyq-waits > * { display: none !important; }
.canopyq-waits + .canopyq-waits::after { content: none !important; }
.canopyq-waits::after { content: "Opens with your guess."; font: italic 14px/2 var(--jp-ui-font-family, sans-serif);
  color: var(--jp-content-font-color1); padding-left: calc(var(--jp-cell-prompt-width, 64px) + 12px); }
/* On a dark page: the boxes' colours turned round, and pictures with their lightness turned and their hues kept. */
body[data-jp-theme-light="false"] .canopyq-box { filter: invert(.92) hue-rotate(180deg); }
body[data-jp-theme-light="false"] :is(.canopyq-card, .jp-RenderedImage) img { filter: invert(.93) hue-rotate(180deg);
  border-radius: 4px; }
.canopyq-card .widget-readout { width: auto; min-width: 4em; max-width: none; overflow: visible; }
.canopyq-card .jupyter-widgets-disconnected::before { content: none; }
.canopyq-card.jupyter-widgets-disconnected::before {
  content: "Not connected: run this cell. If a name is missing, Run → Run All Above Selected Cell helps.";
  display: block; align-self: stretch; font: 14px/1.5 var(--jp-ui-font-family, sans-serif); color: #4a3500;
  background: #fff6df; border-left: 4px solid #b7791f; border-radius: 4px; padding: 4px 12px; }
.canopyq-card.jupyter-widgets-disconnected .canopyq-verdict { display: none; }
.canopyq-card.jupyter-widgets-disconnected button, .canopyq-card.jupyter-widgets-disconnected input,
.canopyq-card.jupyter-widgets-disconnected .noUi-target { pointer-events: none; opacity: .5; }
"""

# What ipywidgets leaves out for those who do not see the page: names of sliders and pictures, which button is pressed,
# that a verdict has come. And what waits for a guess: the outputs of its cell and of the one before.
_NAMES = """
const card = this.closest('.canopyq-card'), each = (at, what) => card.querySelectorAll(at).forEach(what);
const name = () => {
  each('.noUi-handle', it => { const row = it.closest('.widget-inline-hbox'), part = at => row.querySelector(at);
    it.setAttribute('aria-label', part('.widget-label')?.textContent || 'value');
    it.setAttribute('aria-valuetext', part('.widget-readout')?.textContent || it.getAttribute('aria-valuenow')); });
  each('.widget-toggle-button', it => it.setAttribute('aria-pressed', it.classList.contains('mod-active')));
  each('.canopyq-verdict, .canopyq-line', it => it.setAttribute('aria-live', 'polite'));
  each('img', it => it.alt = card.querySelector('.canopyq-line')?.textContent || 'picture');
  const cell = card.matches('.canopyq-reveal') && card.closest('.jp-Cell');
  const waits = card.matches('.canopyq-locked:not(.jupyter-widgets-disconnected)');
  for (const at of cell ? [cell, cell.previousElementSibling] : [])
    at?.querySelectorAll('.jp-OutputArea-child').forEach(it => {
      if (!it.querySelector('.canopyq-card')) it.classList.toggle('canopyq-waits', waits); }); };
name(); new MutationObserver(name).observe(card, {childList: true, subtree: true, attributeFilter: ['class']});
"""
_STYLE = f'<style onload="{html.escape(_NAMES)}">{_CSS}</style>'


class Card:
    """Something a notebook cell can end with.

    A live notebook picks the widget. A code host or a printed page shows ``static_html``, which needs neither a kernel
    nor JavaScript. Both static forms are the same in every run: they never depend on what the reader has answered,
    because the notebook tests compare them.
    """

    def widget(self) -> Widget | None:
        """The live form, built once; None if there is only the static one."""
        return None

    def static_html(self) -> str:
        raise NotImplementedError

    def plain(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.plain()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {}
        if (live := self.widget()) is not None:
            bundle |= live._repr_mimebundle_() or {}
        return bundle | {"text/html": self.static_html(), "text/plain": self.plain()}


class StaticCard(Card):
    """A finished piece of HTML with its one-line form: feedback, results, tables."""

    def __init__(self, html: str, plain: str) -> None:
        self._html, self._plain = html, plain

    def static_html(self) -> str:
        return self._html

    def plain(self) -> str:
        return self._plain


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> StaticCard:
    """A table of anything with a ``str``; columns of numbers are flush right."""
    head = checks.sequence("head", head)
    lines = [[str(cell) for cell in checks.sequence("rows", row)] for row in checks.sequence("rows", rows)]
    shown = [[plain(cell) for cell in line] for line in [list(head), *lines]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    right = numeric_columns(lines, len(head))
    text = "\n".join(
        "  ".join(f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in shown
    )
    return StaticCard(html_table(head, lines), text)
