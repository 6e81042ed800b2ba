"""Lesson 02: symmetric INT8, there and back."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered, clear_of_ties, normal

STUB = """\
def quantize_symmetric(x, scale=None):
    raise NotImplementedError("replace this line")
"""

SOLUTION = """\
def quantize_symmetric(x, scale=None):
    if scale is None:
        scale = x.abs().max() / 127
    codes = torch.clamp(torch.round(x / scale), -127, 127).to(torch.int8)
    return codes, scale, codes * scale
"""


def _wrong(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(SOLUTION, *changes))


_CLAMP = "torch.clamp(torch.round(x / scale), -127, 127)"
_TRUNCATED = (
    "You cut off instead of rounding, so the error reaches a whole step instead of half of one. Use `torch.round`."
)
_WRAP = (
    "Without a clamp a value beyond the range gets a code that INT8 cannot hold, and the cast wraps it around: "
    "150 becomes "
    "-106. Clamp to -127 and 127 before the cast."
)
_UINT8 = "`uint8` has no negative numbers, so -3 turns into 253. These codes are signed: use `torch.int8`."
_MISTAKES = (
    _wrong("no clamp", _WRAP, (_CLAMP, "torch.round(x / scale)")),
    _wrong("no clamp", _WRAP, (_CLAMP + ".to(torch.int8)", "torch.round(x / scale)")),
    _wrong(
        "128 for 127",
        "Your scale is absmax / 128, but the largest code is 127: the largest value lands on 128 and is "
        "clamped. Divide by "
        "127.",
        ("/ 127", "/ 128"),
    ),
    _wrong(
        "full range",
        "Your scale is absmax / 127.5, the full-range convention. It is a good one (the package uses it by "
        "default), but this "
        "exercise asks for the restricted range: absmax / 127.",
        ("/ 127", "/ 127.5"),
    ),
    _wrong(
        "-128 is a code",
        "You clamp to -128 at the lower end. The restricted range leaves that code out, so that -x always has "
        "the code of x "
        "with the sign turned: clamp to -127.",
        ("-127, 127", "-128, 127"),
    ),
    _wrong(
        "scale on the wrong side",
        "You multiply by the scale to get codes and divide to get back. It is the other way round: `x / scale` "
        "counts steps, "
        "`codes * scale` walks them.",
        ("x / scale", "x * scale"),
        ("codes * scale", "codes / scale"),
    ),
    _wrong(
        "scale upside down",
        "Your scale is 127 / absmax, how many steps a unit holds. Here the scale is the width of one step: "
        "absmax / 127.",
        ("x.abs().max() / 127", "127 / x.abs().max()"),
        ("x / scale", "x * scale"),
        ("codes * scale", "codes / scale"),
    ),
    _wrong(
        "no rounding",
        "Your codes are not whole numbers: `x / scale` still has to be rounded.",
        (_CLAMP + ".to(torch.int8)", "torch.clamp(x / scale, -127, 127)"),
    ),
    _wrong("truncation instead of rounding", _TRUNCATED, ("torch.round", "torch.trunc")),
    _wrong("truncation instead of rounding", _TRUNCATED, ("torch.round", "torch.floor")),
    _wrong(
        "always rounded up",
        "You always go up to the next code, so the error reaches a whole step instead of half of one. Use "
        "`torch.round`.",
        ("torch.round", "torch.ceil"),
    ),
    _wrong(
        "largest value, not largest magnitude",
        "Your scale comes from `x.max()`. A large negative value counts as much: use `x.abs().max()`.",
        ("x.abs().max()", "x.max()"),
    ),
    _wrong(
        "given scale ignored",
        "You compute the scale even when one is given. Calibration hands it over: use it as it is.",
        ("    if scale is None:\n        scale =", "    scale ="),
    ),
    _wrong("codes in uint8", _UINT8, ("torch.int8", "torch.int16).to(torch.uint8")),
    _wrong(
        "codes returned as values",
        "The third thing to return is the values that the codes stand for: `codes * scale`.",
        ("scale, codes * scale", "scale, codes"),
    ),
)


def cases() -> list[tuple]:
    """Own scale first, then a scale from calibration that is too small for some of the values."""
    made: list[tuple] = [(torch.tensor([-0.5, 0.3, -0.1, 0.4]), None), (torch.tensor([2.0, -1.4, 0.25]), None)]
    for seed, shape in [(0, (6,)), (1, (4, 5)), (2, (2, 3, 8)), (3, (64,))]:
        x = normal(seed, *shape) * 3**seed
        made.append((clear_of_ties(x, x.abs().max() / 127), None))
    for seed, shape in [(4, (8,)), (5, (6, 6))]:
        x = normal(seed, *shape)
        scale = x.abs().max() / 127 / 1.5
        made.append((clear_of_ties(x, scale), scale))
    return [*made, (torch.tensor([1.5, -1.5, 0.3]), torch.tensor(0.01))]


EXERCISES = [
    Exercise(
        id="02-symmetric",
        title="Symmetric INT8, there and back",
        minutes=8,
        difficulty=2,
        task="""
Write `quantize_symmetric(x, scale=None)` and return three things: `codes, scale, values`.

- If no scale is given, it is `absmax / 127`, where absmax is the largest magnitude in `x`.
- `codes` are whole numbers: `x` counted in steps of `scale`, rounded to the nearest, never beyond -127 and 127, as
  `torch.int8`.
- `values` are what the codes stand for: `codes * scale`.

Convention: the *restricted* range, -127 to 127, which leaves the code -128 unused.
""",
        function="quantize_symmetric",
        stub=STUB,
        solution=SOLUTION,
        hints=(
            "`x.abs().max()` is absmax. Only compute the scale `if scale is None`.",
            "Dividing by the scale counts steps: `torch.round(x / scale)`.",
            "A given scale can be too small for some values. `torch.clamp(…, -127, 127)` comes before "
            "`.to(torch.int8)`.",
        ),
        mistakes=_MISTAKES,
        cases=cases,
        parts=("codes", "scale", "values"),
        integers=("codes",),
    ),
]
