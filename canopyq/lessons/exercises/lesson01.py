"""Lesson 01: rounding to a floating-point grid by hand."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered

SOLUTION = """\
def round_to_format(x, mantissa_bits):
    exponent = torch.floor(torch.log2(x.abs()))
    step = 2.0 ** (exponent - mantissa_bits)
    rounded = torch.round(x / step) * step
    return torch.where(x == 0, x, rounded)
"""

STUB = altered(  # two faults
    SOLUTION,
    ("torch.floor(torch.log2", "torch.round(torch.log2"),
    ("torch.where(x == 0, x, rounded)", "rounded"),
)


def _wrong(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(SOLUTION, *changes))


_TRUNCATED = "You cut off instead of rounding: every result lies on the same side of `x`. Use `torch.round`."
_MISTAKES = (
    _wrong(
        "zero becomes NaN",
        "`log2(0)` is minus infinity, so the step of a zero is 0 and `0 / 0` is NaN. Give zero back as it is, "
        "for example "
        "with `torch.where(x == 0, x, rounded)`.",
        ("torch.where(x == 0, x, rounded)", "rounded"),
    ),
    _wrong("truncation instead of rounding", _TRUNCATED, ("torch.round", "torch.trunc")),
    _wrong("truncation instead of rounding", _TRUNCATED, ("torch.round", "torch.floor")),
    _wrong(
        "always rounded up",
        "You always go up to the next step, so every result is at least as large as `x`. The nearest one is asked for: "
        "`torch.round`.",
        ("torch.round", "torch.ceil"),
    ),
    _wrong(
        "one step for all sizes",
        "Your step is the same everywhere, which makes this a fixed-point format. In a floating-point format "
        "the step grows "
        "with the number: `2 ** (exponent - mantissa_bits)`.",
        ("2.0 ** (exponent - mantissa_bits)", "torch.tensor(2.0 ** -mantissa_bits)"),
    ),
    _wrong(
        "one mantissa bit too few",
        "Your step is twice as wide as it should be. The leading 1 of the mantissa is not stored, so all of "
        "`mantissa_bits` "
        "lie behind the point.",
        ("exponent - mantissa_bits", "exponent - mantissa_bits + 1"),
    ),
    _wrong(
        "one mantissa bit too many",
        "Your step is half as wide as it should be: the leading 1 is already in the exponent, do not count it again.",
        ("exponent - mantissa_bits", "exponent - mantissa_bits - 1"),
    ),
    _wrong(
        "exponent rounded, not floored",
        "You take the nearest power of two. The exponent is that of the power of two *below* `|x|`: "
        "`floor(log2(|x|))`.",
        ("torch.floor(torch.log2", "torch.round(torch.log2"),
    ),
    _wrong(
        "natural logarithm",
        "`torch.log` is the natural logarithm. The exponent counts powers of two: `torch.log2`.",
        ("torch.log2", "torch.log"),
    ),
    _wrong(
        "step on the wrong side",
        "Divide by the step before rounding and multiply by it after. You do it the other way round.",
        ("torch.round(x / step) * step", "torch.round(x * step) / step"),
    ),
    _wrong(
        "still counted in steps",
        "You return how many steps it is to `x`. Multiply by the step again to come back to a number.",
        ("torch.round(x / step) * step", "torch.round(x / step)"),
    ),
    _wrong(
        "sign lost",
        "Your results are all positive. Take `abs` for the exponent only, and round `x` itself.",
        ("torch.round(x / step)", "torch.round(x.abs() / step)"),
    ),
)


def cases() -> list[tuple]:
    """Numbers of every size, and zero only after a few inputs without it."""
    made: list[tuple] = [
        (torch.tensor([1.1, 1.7, 5.3, 10.7]), 2),
        (torch.tensor([-0.3, 0.07, -13.0, 1000.3]), 3),
    ]
    for seed, shape, bits in [(0, (7,), 7), (1, (3, 5), 3), (2, (40,), 2), (3, (2, 3, 4), 10)]:
        generator = torch.Generator().manual_seed(seed)
        size = torch.rand(shape, generator=generator) * 16 - 8
        sign = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
        made.append((sign * 2.0**size, bits))
    return [*made, (torch.tensor([0.0, 1.1, -0.0, 2.7]), 3), (torch.zeros(2, 2), 2)]


ROUND = Exercise(
    id="01-round-to-format",
    title="Mend a rounding",
    minutes=10,
    difficulty=3,
    task="""
`round_to_format(x, mantissa_bits)` in the cell below should round each value of the tensor `x` to the nearest number
that a format with so many mantissa bits can hold, its exponent as wide as it needs to be. With 7 mantissa bits that is
BF16, with 3 it is FP8 E4M3. Whoever wrote it tried 1.1 and 2.3 and was content. Then it was given padding, and NaN came
back; and numbers such as 1.7 came out coarser than they should.

There are **two faults** in it. Find and mend them.
""",
    function="round_to_format",
    stub=STUB,
    solution=SOLUTION,
    hints=(
        "Try it on 1.7 with 2 mantissa bits. Between 1 and 2 such a format has 1, 1.25, 1.5 and 1.75: which is "
        "nearest, and "
        "what comes out? And what is `log2(0)`?",
        "The exponent is that of the power of two *below* the value. And a zero has none: it has to be taken care of "
        "apart.",
        "`torch.floor(torch.log2(x.abs()))`, and at the end `torch.where(x == 0, x, rounded)`.",
    ),
    mistakes=_MISTAKES,
    cases=cases,
)

EXERCISES = [ROUND]
