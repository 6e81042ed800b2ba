"""An explorer as pictures and lines of numbers that were drawn beforehand, for a page without a kernel."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

from ipywidgets import FloatLogSlider, FloatSlider, IntSlider, SelectionSlider, ToggleButtons, Widget

from ..canvas import detached, png
from .explorer import Explorer

STOPS = 9  # of a slider with more places than that
MOST = 50  # pictures of one explorer; beyond, one control moves while the others stay where they begin


def record(explorer: Explorer, path: Path | str) -> None:
    """Write `recorded` as JSON."""
    Path(path).write_text(json.dumps(recorded(explorer)), encoding="utf-8")


def recorded(explorer: Explorer) -> dict[str, Any]:
    """What the explorer shows at each place of its controls.

    Returns:
        "name" and "title"; "controls": each with its "label", whether it is a "slider", the texts of its "places" and
        the one that it "starts" at; "frames": "0,2" (a place of each control) -> [line as HTML, PNG in base64 or None].
    """
    controls = explorer.make_controls()
    moved = {name: widget for name, widget in controls.items() if isinstance(widget, tuple(_PLACES))}
    places = {name: _PLACES[type(widget)](widget) for name, widget in moved.items()}
    starts = [_start(widget, places[name]) for name, widget in moved.items()]
    every = [range(len(of)) for of in places.values()]
    keys = list(itertools.product(*every))
    if len(keys) > MOST:
        keys = list(dict.fromkeys((*starts[:i], at, *starts[i + 1 :]) for i, of in enumerate(every) for at in of))
    frames = {}
    for key in keys:
        for (name, widget), at in zip(moved.items(), key, strict=True):
            widget.value = places[name][at][1]
        figure = detached()
        line = explorer.draw(figure, **{name: widget.value for name, widget in controls.items()})
        frames[",".join(map(str, key))] = [line, base64.b64encode(png(figure)).decode() if figure.axes else None]
    described = [
        {
            "label": widget.description,
            "slider": not isinstance(widget, ToggleButtons),
            "places": [text for text, _ in places[name]],
            "start": start,
        }
        for (name, widget), start in zip(moved.items(), starts, strict=True)
    ]
    return {"name": explorer.name, "title": explorer.title, "controls": described, "frames": frames}


def _start(widget: Widget, places: list[tuple[str, Any]]) -> int:
    values = [value for _, value in places]
    return values.index(widget.value) if widget.value in values else 0


def _of_choice(widget: SelectionSlider | ToggleButtons) -> list[tuple[str, Any]]:
    options = widget.options.items() if isinstance(widget.options, dict) else widget.options
    return [(str(o[0]), o[1]) if isinstance(o, tuple) else (str(o), o) for o in options]


def _of_slider(widget: IntSlider | FloatSlider | FloatLogSlider) -> list[tuple[str, Any]]:
    low, high, step = widget.min, widget.max, widget.step
    count = round((high - low) / step)
    stops = {round(i * count / min(count, STOPS - 1)) for i in range(min(count, STOPS - 1) + 1)}
    at = [low + stop * step for stop in stops]
    log = isinstance(widget, FloatLogSlider)
    values = {round(widget.base**x if log else x, 10) for x in at} | {widget.value}
    return [(format(value, widget.readout_format), value) for value in sorted(values)]


_PLACES = {SelectionSlider: _of_choice, ToggleButtons: _of_choice, IntSlider: _of_slider, FloatSlider: _of_slider,
           FloatLogSlider: _of_slider}  # fmt: skip
