"""What an explorer shows, drawn beforehand."""

from __future__ import annotations

import base64

import torch

from canopyq.lessons import explore
from canopyq.lessons.explore.recording import MOST, recorded


def test_every_place_of_few_controls_is_drawn_as_the_explorer_draws_it() -> None:
    explorer = explore.bits(torch.linspace(-1, 2, 200))
    got = recorded(explorer)
    assert [len(control["places"]) for control in got["controls"]] == [7, 3, 2]
    assert len(got["frames"]) == 7 * 3 * 2 <= MOST
    explorer.widget()
    bits, ranges, picture = explorer.controls.values()
    bits.value, ranges.index, picture.index = 2, 1, 1
    line, png = got["frames"]["0,1,1"]
    assert line == explorer.line.value
    assert base64.b64decode(png)[:4] == b"\x89PNG"


def test_of_many_controls_one_moves_at_a_time() -> None:
    got = recorded(explore.choose())
    starts = [control["start"] for control in got["controls"]]
    assert len(got["frames"]) == 1 + sum(len(control["places"]) - 1 for control in got["controls"]) <= MOST
    for key in got["frames"]:
        moved = [at != start for at, start in zip(map(int, key.split(",")), starts, strict=True)]
        assert sum(moved) <= 1
