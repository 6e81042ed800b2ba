"""``explore.float_bits``: the bits of one number in each floating-point format."""

from __future__ import annotations

import html
import math

import torch
from ipywidgets import FloatText, Widget
from matplotlib.figure import Figure

from canopyq.tensor.formats import FloatFormat, get_format

from ..html import KINDS, box, buttons
from .explorer import Explorer

FORMATS = ("fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2")
PRESETS = {
    "0.1": 0.1,
    "1/3": 1 / 3,
    "-6.5": -6.5,
    "448": 448.0,
    "1000": 1000.0,
    "70 000": 70000.0,
    "0.0001": 1e-4,
    "1e-7": 1e-7,
}
_INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_CELL = (
    f"color:{KINDS['info'][1]};background:{KINDS['info'][0]};text-align:left;padding:2px 12px 2px 0;white-space:nowrap"
)
_COLOURS = {"sign": "#b3400f", "exponent": "#00684b", "mantissa": "#005a8f"}


class FloatBits(Explorer):
    """Type a number and see its sign, exponent and mantissa in FP32, FP16, BF16 and both FP8 formats."""

    name = "float-bits"
    title = "One number in five formats, bit by bit"

    def __init__(self, value: float = 0.1) -> None:
        self.value = float(value)

    def make_controls(self) -> dict[str, Widget]:
        number = FloatText(self.value, description="number", continuous_update=False)
        presets = buttons(PRESETS, None)

        def choose(change: dict) -> None:
            if change["new"] is not None and change["new"] != number.value:
                number.value = change["new"]

        def typed(change: dict) -> None:
            if presets.value is not None and presets.value != change["new"]:
                presets.value = None

        presets.observe(choose, "value")
        number.observe(typed, "value")
        return {"number": number, "presets": presets}

    def draw(self, figure: Figure, number: float, presets: float | None) -> str:
        if math.isnan(number):
            return box("bad", "That is not a number. Type something like 0.1 or 3e-5.")
        key = " ".join(f'<b style="color:{c}">{name}</b>' for name, c in _COLOURS.items())
        head = "".join(f'<th style="{_CELL}">{h}</th>' for h in ("format", key, "rounds to", "off by"))
        lines = "".join(_row(name, number) for name in FORMATS)
        return box("info", f'<table style="border-collapse:collapse;font-size:13px"><tr>{head}</tr>{lines}</table>')

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for name in FORMATS:
            sign, exponent, mantissa = split_bits(self.value, name)
            kept = stored(self.value, name)
            lines.append(
                [name, f"`{sign}` `{exponent}` `{mantissa}`", _shown(kept, self.value, name), _off(kept, self.value)]
            )
        return [f"{self.value:.6g} in", "sign, exponent, mantissa", "rounds to", "off by"], lines


def stored(value: float, name: str) -> float:
    """What the format keeps of a number. Too large is infinity; E4M3 has none and stays at its largest value."""
    return _cast(value, name).double().item()


def split_bits(value: float, name: str) -> tuple[str, str, str]:
    """Sign, exponent and mantissa bits as they lie in memory."""
    fmt = _format(name)
    pattern = _cast(value, name).view(_INTEGERS[fmt.bits // 8]).item() % 2**fmt.bits
    bits = f"{pattern:0{fmt.bits}b}"
    return bits[0], bits[1 : 1 + fmt.exponent_bits], bits[1 + fmt.exponent_bits :]


def _cast(value: float, name: str) -> torch.Tensor:
    fmt = _format(name)
    number = torch.tensor([value], dtype=torch.float64).float()
    if fmt.special == "nan":  # what casting does beyond the largest value has changed between versions of torch
        number = number.clamp(-fmt.largest, fmt.largest)
    return number.to(fmt.dtype)


def _format(name: str) -> FloatFormat:
    return get_format(name)  # type: ignore[return-value]


def _row(name: str, value: float) -> str:
    cells = "".join(
        f'<span style="color:{colour};margin-right:5px">{bits}</span>'
        for bits, colour in zip(split_bits(value, name), _COLOURS.values(), strict=True)
    )
    kept = stored(value, name)
    return (
        f'<tr class="canopyq-format-{name}"><td style="{_CELL}"><b>{name}</b></td>'
        f'<td style="{_CELL};font-family:monospace">{cells}</td>'
        f'<td style="{_CELL}">{html.escape(_shown(kept, value, name))}</td>'
        f'<td style="{_CELL}">{_off(kept, value)}</td></tr>'
    )


def _shown(kept: float, value: float, name: str) -> str:
    if math.isinf(kept):
        return "infinity (too large)"
    largest = _format(name).largest
    return f"{kept:.9g}{' (its largest)' if abs(value) > largest == abs(kept) else ''}"


def _off(kept: float, value: float) -> str:
    if not math.isfinite(kept) or not math.isfinite(value):
        return "everything"
    error = abs(kept - value)
    return "0" if error == 0 or value == 0 else f"{error:.2g} (relative {error / abs(value):.2g})"
