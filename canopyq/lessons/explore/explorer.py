"""What all explorers have in common: controls above, a picture and a line of numbers below.

A callback writes a PNG into ``Image.value`` and text into ``HTML.value``. It prints nothing and shows nothing, since
output from a callback would land in a cell that is long finished.

To find out where axes go takes matplotlib longer than to draw them. So it is done once for every choice of buttons;
while a slider moves, axes stay where they are, and the picture does not jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ipywidgets import HTML, GridBox, Image, Layout, ToggleButtons, VBox, Widget
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ..canvas import DPI, detached, png
from ..html import Card, frame, heading, html_table, section
from ..text import inline


class Explorer(Card):
    """Something to move and to watch.

    Attributes:
        name: a short id, used in ``text/plain`` and in CSS classes.
        title: of the card.
        about: HTML above the table that stands for the explorer where nothing moves.
    """

    name: str
    title: str
    about = ""

    def make_controls(self) -> dict[str, Widget]:
        """The controls: widgets with a ``value``, by name."""
        raise NotImplementedError

    def draw(self, figure: Figure, **values: object) -> str:
        """Draw what the controls' values say (or leave the figure alone), and return the line of numbers as HTML."""
        raise NotImplementedError

    def rows(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        """Header and rows of the table that stands for the explorer where nothing moves."""
        raise NotImplementedError

    @cached_property
    def controls(self) -> dict[str, Widget]:
        """The controls of the live form."""
        return self.make_controls()

    def widget(self) -> VBox:
        return self._live

    @cached_property
    def _live(self) -> VBox:
        self.image = Image(format="png", layout=Layout(max_width="100%", width="768px", display="none"))
        self.line = HTML("")
        self.line.add_class("canopyq-line")
        self._places: dict[tuple, list[Bbox]] = {}
        for control in self.controls.values():
            control.observe(self._changed, "value")
            if hasattr(control, "readout"):  # a slider: its label and what it reads are whole
                control.layout.width, control.style.description_width = "auto", "initial"
        self._changed()
        grid = Layout(grid_template_columns="repeat(auto-fit, minmax(340px, 1fr))", grid_gap="2px 18px", width="100%")
        controls = GridBox(list(self.controls.values()), layout=grid)
        live = [HTML(heading("Explore", self.title)), controls, self.image, self.line]
        return frame(live, "canopyq-explore", f"canopyq-explore-{self.name}")

    def _changed(self, _change: object = None) -> None:
        figure = detached()
        self.line.value = self.draw(figure, **{name: control.value for name, control in self.controls.items()})
        if figure.axes:
            buttons = [control.value for control in self.controls.values() if isinstance(control, ToggleButtons)]
            kind = (*buttons, len(figure.axes), figure.get_figheight())
            if kind in self._places:
                figure.set_layout_engine("none")
                for axes, place in zip(figure.axes, self._places[kind], strict=True):
                    axes.set_position(place)
            self.image.value = png(figure, 2 * DPI)
            self.image.layout.display = None
            self._places.setdefault(kind, [axes.get_position() for axes in figure.axes])

    def static_html(self) -> str:
        head, rows = self.rows()
        note = (
            '<p style="margin:4px 0;font-size:13px;opacity:.8">In a live notebook there is something to move here.</p>'
        )
        return section(heading("Explore", self.title) + self.about + html_table(head, rows) + note)

    def plain(self) -> str:
        return f"Explore {self.name}: {self.title} ({inline(', '.join(self.controls))})"
