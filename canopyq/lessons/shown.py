"""What every card has in common: it displays as a live widget, as plain HTML, and as one line of text."""

from __future__ import annotations

from typing import Any

from ipywidgets import Widget


class Shown:
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


class Fixed(Shown):
    """A finished piece of HTML with its one-line form: feedback, results, tables."""

    def __init__(self, html: str, plain: str) -> None:
        self._html, self._plain = html, plain

    def static_html(self) -> str:
        return self._html

    def plain(self) -> str:
        return self._plain
