"""Lesson 02: signed codes with a zero point."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered, clear_of_ties, normal

SOLUTION = """\
def quantize(x, bits):
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / (qmax - qmin)
    zero_point = torch.round(qmin - low / scale)
    codes = torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax)
    return codes.to(torch.int8), scale, zero_point.to(torch.int8)
"""

STUB = altered(  # two faults
    SOLUTION,
    ("torch.round(qmin - low / scale)", "torch.round(-low / scale)"),
    ("x.min().clamp(max=0), x.max().clamp(min=0)", "x.min(), x.max()"),
    (".to(torch.int8)", ""),
)


def _wrong(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(SOLUTION, *changes))


_TRUNCATED = (
    "You cut off instead of rounding, so the error reaches a whole step instead of half of one. Use `torch.round`."
)
_CUT = (
    "Your zero point goes to the whole number on one side of it, as a cast to an integer does, and not to the nearest "
    "one: it can be a whole code off. Round it: `torch.round(qmin - low / scale)`."
)
_MISTAKES = (
    _wrong(
        "no clamp",
        "The zero point is rounded as well, so the largest value can land one code beyond the end: -3.5 and "
        "11.5 in 4 bits give "
        "codes -8 and 8, and 8 is not INT4. Clamp to `qmin` and `qmax`.",
        ("torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax)", "torch.round(x / scale) + zero_point"),
    ),
    _wrong(
        "missing qmin in the zero point",
        "Your zero point is `round(-low / scale)`, which is right for codes that begin at 0. Signed codes "
        "begin at `qmin`: "
        "`round(qmin - low / scale)`.",
        ("torch.round(qmin - low / scale)", "torch.round(-low / scale)"),
        (".to(torch.int8)", ""),
    ),
    _wrong(
        "unsigned codes",
        "Your codes run from 0 to `2**bits - 1`. That is a convention too, but this exercise (as PyTorch and "
        "compressed-tensors) "
        "asks for signed ones: from `qmin = -2**(bits-1)` to `qmax = 2**(bits-1) - 1`.",
        ("qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1", "qmin, qmax = 0, 2**bits - 1"),
        (".to(torch.int8)", ""),
    ),
    _wrong(
        "range without zero",
        "Your range runs from the smallest to the largest value. If all of them are on one side, real zero has "
        "no code. Widen "
        "the range until it holds 0: `x.min().clamp(max=0)`, `x.max().clamp(min=0)`.",
        ("x.min().clamp(max=0), x.max().clamp(min=0)", "x.min(), x.max()"),
        (".to(torch.int8)", ""),
    ),
    _wrong(
        "`2**bits` for `2**bits - 1`",
        "Your scale divides the range by `2**bits`. That many codes have one step fewer between them: divide by "
        "`qmax - qmin`.",
        ("/ (qmax - qmin)", "/ 2**bits"),
    ),
    _wrong(
        "symmetric scale",
        "Your range is centred on zero, so a one-sided tensor wastes half of its codes. Let it run from `low` "
        "to `high`.",
        ("    scale =", "    high = torch.maximum(-low, high)\n    low = -high\n    scale ="),
    ),
    _wrong(
        "truncation instead of rounding",
        _TRUNCATED,
        ("torch.round(x / scale)", "torch.trunc(x / scale)"),
    ),
    _wrong("truncation instead of rounding", _TRUNCATED, ("torch.round(x / scale)", "torch.floor(x / scale)")),
    _wrong(
        "zero point not rounded",
        "Your zero point is not a whole number. It is a code, the one that stands for 0.0: round it.",
        ("torch.round(qmin - low / scale)", "qmin - low / scale"),
        (".to(torch.int8)", ""),
    ),
    _wrong(
        "zero point not to the nearest",
        _CUT,
        ("torch.round(qmin - low / scale)", "(qmin - low / scale).to(torch.int8)"),
    ),
    _wrong(
        "zero point not to the nearest", _CUT, ("torch.round(qmin - low / scale)", "torch.floor(qmin - low / scale)")
    ),
    _wrong("zero point not to the nearest", _CUT, ("torch.round(qmin - low / scale)", "qmin - low / scale")),
    _wrong(
        "zero point not to the nearest",
        _CUT,
        ("torch.round(qmin - low / scale)", "qmin - low / scale"),
        ("torch.round(x / scale) + zero_point", "torch.round(x / scale + zero_point)"),
    ),
    _wrong(
        "always rounded up",
        "You always go up to the next code, so the error reaches a whole step instead of half of one. Use "
        "`torch.round`.",
        ("torch.round(x / scale)", "torch.ceil(x / scale)"),
    ),
    _wrong(
        "zero point subtracted",
        "You subtract the zero point where codes are made. Add it here; dequantizing subtracts it.",
        ("torch.round(x / scale) + zero_point", "torch.round(x / scale) - zero_point"),
    ),
    _wrong(
        "zero point left out",
        "Your codes do not contain the zero point: `round(x / scale) + zero_point`.",
        ("torch.round(x / scale) + zero_point", "torch.round(x / scale)"),
    ),
    _wrong(
        "scale on the wrong side",
        "Codes count steps, so divide: `x / scale`. You multiply.",
        ("torch.round(x / scale)", "torch.round(x * scale)"),
    ),
    _wrong(
        "always 8 bits",
        "`bits` makes no difference to your codes. Compute `qmin` and `qmax` from it.",
        ("-(2 ** (bits - 1)), 2 ** (bits - 1) - 1", "-128, 127"),
    ),
)


def cases() -> list[tuple]:
    """Ranges on both sides, above zero, below zero, and one whose ends lie exactly between two codes."""
    made: list[tuple] = [(torch.tensor([0.0, 0.7, 0.2, 1.3]), 8), (torch.tensor([-1.0, 0.47, 2.0, 0.13]), 4)]
    recipes = [
        (0, (7,), 8, 0.4),
        (1, (4, 5), 4, 1.1),
        (2, (32,), 3, -0.7),
        (3, (2, 3, 4), 2, 0.3),
        (4, (9,), 8, 6.0),
        (5, (9,), 4, -6.0),
    ]
    for seed, shape, bits, shift in recipes:
        x = normal(seed, *shape) + shift
        step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / (2**bits - 1)
        made.append((clear_of_ties(x, step), bits))
    return [*made, (torch.tensor([-3.5, 0.2, 4.1, 11.5]), 4), (torch.tensor([[3.0, 4.2], [5.0, 3.3]]), 8)]


EXERCISES = [
    Exercise(
        id="02-quantize-asymmetric",
        title="Whose zero is not zero",
        minutes=10,
        difficulty=3,
        task="""
`quantize(x, bits)` in the cell below should return signed asymmetric codes, their scale, and the zero point, so that
values come back by `(codes - zero_point) * scale`. On the inputs of a layer it makes two kinds of mistakes:

- the larger half of the values comes back as one and the same number;
- where all values lie between 3 and 5, the zero point lies far outside of the codes: none of them stands for 0.0.

There are **two faults** in it, one for each. Find and mend them. (Any whole-number dtype will do for the codes.)
""",
        function="quantize",
        stub=STUB,
        solution=SOLUTION,
        hints=(
            "Where does the smallest value land? It should get the smallest code. And which code does 0.0 get if all "
            "values "
            "lie between 3 and 5?",
            "Signed codes begin at `qmin`, not at 0. And the range has to hold zero, or no code can stand for it.",
            "`torch.round(qmin - low / scale)`; and `x.min().clamp(max=0)`, `x.max().clamp(min=0)` for the two ends.",
        ),
        mistakes=_MISTAKES,
        cases=cases,
        parts=("codes", "scale", "zero_point"),
        integers=("codes", "zero_point"),
    ),
]
