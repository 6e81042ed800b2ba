"""The figures: every text inside the canvas, no two texts on top of each other, and files that stay small."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import combinations

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

import canopyq as cq
from canopyq.lessons import plots


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def panels(*shape: int, format: str = "int4") -> Figure:
    x = normal(*shape)
    return plots.four_panels(x, cq.quantize(x, format, "tensor"), title="A title")


def values(*names: str) -> dict[str, torch.Tensor]:
    return {name: cq.get_format(name).values() for name in names}


X = normal(2000)
Q = cq.quantize(X, "int4", "tensor")
SURE = (0.9, 0.85, 0.95)
TRADES = {
    "4 bits": {"one": (4.0, 0.02, SURE), "two": (4.05, 0.002, SURE), "three": (4.5, 0.001, SURE)},
    "3 bits": {"one": (3.0, 0.4, (0.6, 0.5, 0.7)), "two": (3.05, 0.01, SURE), "three": (3.5, 0.005, SURE)},
}
FIGURES: dict[str, Callable[[], Figure]] = {
    "panels 4": lambda: panels(4),
    "panels 1x12": lambda: panels(1, 12),
    "panels 2x8": lambda: panels(2, 8, format="int8"),
    "panels 4x4": lambda: panels(4, 4),
    "panels 6x6": lambda: panels(6, 6),
    "panels 12x12": lambda: panels(12, 12, format="int8"),
    "panels 300x200": lambda: panels(300, 200),
    "panels mixed": lambda: plots.four_panels(
        torch.tensor([-1.0, 0.5, 0.2, 127.5]), torch.tensor([-1, 0, 0, 127]), torch.tensor([-1.0, 0.0, 0.0, 127.0])
    ),
    "channels": lambda: plots.channels({"one": normal(256).abs(), "two": normal(1024).abs()}, title="A title"),
    "panels zeros": lambda: plots.four_panels(torch.zeros(3, 3), torch.zeros(3, 3), torch.zeros(3, 3)),
    "panels tiny": lambda: plots.four_panels(normal(3, 3) * 1e-4, torch.zeros(3, 3), torch.zeros(3, 3)),
    "line": lambda: plots.number_line(values("int4", "int8", "nf4", "fp8_e4m3", "fp8_e5m2", "fp16"), "All formats"),
    "line bf16": lambda: plots.number_line(values("bf16", "fp16"), "Wide"),
    "line int4": lambda: plots.number_line(values("int4"), "One"),
    "line linear": lambda: plots.number_line(values("int4", "fp4_e2m1"), linear_below=float("inf")),
    "bars": lambda: plots.bars({"FP32": 28, "BF16": 14, "INT8": 7, "INT4": 3.5}, title="7B", budget=8),
    "bars plain": lambda: plots.bars({"a": 1.0, "b": 0.0}, unit=""),
    "staircase": lambda: plots.staircase(X[:300], Q.dequantize()[:300], "INT4", step=Q.scale.item()),
    "histogram": lambda: plots.histogram_with_grid(X, Q.dequantize(), "Levels", limits=(-2, 2)),
    "histogram 256": lambda: plots.histogram_with_grid(X, cq.quantize(X, "int8", "tensor").dequantize()),
    "curve": lambda: plots.curve(
        [2, 4, 8, 16], {"a": [4, 3, 2, 1], "b": [1, 1, 1, 2]}, "x", "y", "Curve", log="xy", mark=5
    ),
    "dots": lambda: plots.dots(
        {"one": {"w4": 0.0012, "w2": 0.1, "w8": 7e-5}, "two": {"w4": 0.0005, "w2": 0.03}, "three": {"w8": 9e-5}},
        "x",
        "D",
    ),
    "trade-off": lambda: plots.trade_off(TRADES, {"one": "right", "two": "left", "three": "below"}, title="A title"),
}


def texts(figure: Figure) -> list[tuple[str, object]]:
    """Every visible text with the box that it fills in pixels."""
    renderer = figure.canvas.get_renderer()
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    hidden = set()  # ticks beyond the axis limits exist but are not drawn
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            drawn = {id(label) for tick in axis._update_ticks() for label in (tick.label1, tick.label2)}
            every = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {id(label) for tick in every for label in (tick.label1, tick.label2)} - drawn
    return [(t.get_text(), t.get_window_extent(renderer)) for t in found if id(t) not in hidden]


@pytest.mark.parametrize("name", FIGURES)
def test_texts_neither_overlap_nor_leave_the_canvas_and_the_picture_is_small(name: str) -> None:
    figure = FIGURES[name]()
    figure.canvas.draw()
    boxes = texts(figure)
    assert boxes
    whole = figure.bbox
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1, (
            f"{text!r} is cut off"
        )
    for (one, a), (two, b) in combinations(boxes, 2):
        width = min(a.x1, b.x1) - max(a.x0, b.x0)
        height = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert not (width > 1 and height > 2), f"{one!r} lies on {two!r}"
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    assert len(file.getvalue()) < 70_000
    assert figure.get_figwidth() == 8 and figure.dpi <= 100


def test_original_and_dequantized_share_their_colours() -> None:
    figure = panels(5, 5)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    original, codes, dequantized, error = images[:4]
    assert original.get_clim() == dequantized.get_clim() != codes.get_clim()
    low, high = error.get_clim()
    assert low == -high and error.get_cmap().name == "RdBu_r"


def test_small_tensors_have_their_numbers_and_large_ones_do_not() -> None:
    written = {t.get_text() for axes in panels(4, 4).axes for t in axes.texts}
    codes = cq.quantize(normal(4, 4), "int4", "tensor").codes
    assert {str(code) for code in codes.flatten().tolist()} <= written
    assert not [t for axes in panels(13, 4).axes for t in axes.texts]


def test_plain_tensors_and_the_quantized_tensor_give_the_same_picture() -> None:
    x = normal(3, 4)
    q = cq.quantize(x, "int4", "tensor")
    one, two = plots.four_panels(x, q), plots.four_panels(x, q.codes, q.dequantize())
    for a, b in zip(one.axes[:4], two.axes[:4], strict=True):
        assert (a.images[0].get_array() == b.images[0].get_array()).all()


def test_the_style_does_not_leak() -> None:
    before = dict(plt.rcParams)
    FIGURES["bars"]()
    assert dict(plt.rcParams) == before
