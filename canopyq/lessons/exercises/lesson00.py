"""Lesson 00: what a model weighs."""

from __future__ import annotations

from .base import Exercise, Mistake, altered

STUB = """\
def model_bytes(parameters, bits):
    raise NotImplementedError("replace this line")
"""

SOLUTION = """\
def model_bytes(parameters, bits):
    return parameters * bits / 8
"""


def _wrong(name: str, message: str, formula: str) -> Mistake:
    return Mistake(name, message, altered(SOLUTION, ("parameters * bits / 8", formula)))


BYTES = Exercise(
    id="00-bytes",
    title="How many bytes is a model?",
    minutes=3,
    difficulty=1,
    task="""
Write `model_bytes(parameters, bits)`: the bytes that this many parameters fill at this many bits each, as a float.

Bytes, not gigabytes. A byte has 8 bits, and the answer may be a fraction: three 4-bit weights fill 1.5 bytes.
""",
    function="model_bytes",
    stub=STUB,
    solution=SOLUTION,
    hints=(
        "First count the bits of the whole model.",
        "There are 8 bits in a byte. Divide once, at the end.",
        "`/` keeps the fraction, `//` throws it away.",
    ),
    mistakes=(
        _wrong(
            "bits, not bytes", "Your answer is 8 times too large: it counts bits. Divide by 8.", "parameters * bits"
        ),
        _wrong(
            "gigabytes, not bytes",
            "Your answer is in gigabytes. Return bytes, and divide by `1e9` only where it is printed.",
            "parameters * bits / 8 / 1e9",
        ),
        _wrong(
            "gibibytes, not bytes",
            "Your answer is divided by `1024**3`, which gives gibibytes (GiB). Return plain bytes.",
            "parameters * bits / 8 / 1024**3",
        ),
        _wrong(
            "fraction cut off",
            "`//` (or `int`) cuts off the fraction: three 4-bit weights fill 1.5 bytes. Divide with `/`.",
            "parameters * bits // 8",
        ),
        _wrong(
            "bits divided first",
            "`bits // 8` is 0 below 8 bits, so an INT4 model would weigh nothing. Multiply first, then divide "
            "with `/`.",
            "parameters * (bits // 8)",
        ),
        _wrong(
            "multiplied by 8",
            "You multiply by 8 where you have to divide: 8 bits make one byte.",
            "parameters * bits * 8",
        ),
        _wrong(
            "bytes for bits",
            "Your answer treats `bits` as if it were bytes to divide by. Twice the bits has to be twice the bytes.",
            "parameters * 8 / bits",
        ),
    ),
    cases=lambda: [(3, 4), (1001, 3), (7_000_000_000, 16), (7_000_000_000, 4), (124_439_808, 32), (5, 2), (1, 1)],
)

EXERCISES = [BYTES]
