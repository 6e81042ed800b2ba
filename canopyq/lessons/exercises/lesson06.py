"""Lesson 06: scales for groups, and what they cost."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered, normal

SCALES = """\
def group_scales(w, group_size, bits):
    rows, columns = w.shape
    groups = w.reshape(rows, columns // group_size, group_size)
    absmax = groups.abs().amax(dim=-1, keepdim=True)
    return absmax / ((2**bits - 1) / 2)
"""

SCALES_STUB = altered(  # two faults
    SCALES,
    (
        "w.reshape(rows, columns // group_size, group_size)",
        "w.reshape(rows, group_size, columns // group_size).transpose(1, 2)",
    ),
    (".abs()", ""),
)


def _scales(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(SCALES, *changes))


_CUT = "w.reshape(rows, columns // group_size, group_size)"
_ABSMAX = "groups.abs().amax(dim=-1, keepdim=True)"
_HALF = "((2**bits - 1) / 2)"
_MISTAKES = (
    _scales(
        "groups down the columns",
        "Your groups run down the columns. A group is a run of neighbours *within one row*: the inputs of one output.",
        (_CUT, "w.T.reshape(columns, rows // group_size, group_size)"),
    ),
    _scales(
        "groups across rows",
        "Your groups are cut from the transposed matrix, so the values of one group come from different rows. Reshape "
        "`w` itself: each row is cut into `columns // group_size` runs.",
        (_CUT, "w.T.reshape(rows, columns // group_size, group_size)"),
    ),
    _scales(
        "every n-th value instead of neighbours",
        "You cut each row into `group_size` runs and take one value from each, so a group is every n-th value. "
        "Neighbours belong together: `group_size` is the *last* dimension.",
        (_CUT, "w.reshape(rows, group_size, columns // group_size).transpose(1, 2)"),
    ),
    _scales(
        "group size and number of groups swapped",
        "You cut each row into `group_size` groups of `columns // group_size` values, so both numbers have changed "
        "places. "
        "The values of a group are the *last* dimension: `w.reshape(rows, columns // group_size, group_size)`.",
        (_CUT, "w.reshape(rows, group_size, columns // group_size)"),
    ),
    _scales(
        "one scale for all",
        "You have a single scale: the ruler of the largest value for everyone. That is per tensor. Take the largest "
        "magnitude along the last dimension only.",
        (_ABSMAX, "groups.abs().max()"),
    ),
    _scales(
        "one scale a row",
        "You have one scale for each row, which is per channel. Cut the rows into groups before you look for the "
        "largest magnitude.",
        (_CUT, "w.reshape(rows, 1, columns)"),
    ),
    _scales(
        "maximum across the groups",
        "You take the largest magnitude over the wrong dimension: across the groups of a row instead of along each "
        "group. It is `dim=-1`.",
        ("dim=-1", "dim=1"),
    ),
    _scales(
        "forgotten keepdim",
        "The numbers are right and the shape is (rows, groups). Keep the last dimension with `keepdim=True`, so that "
        "`groups / scales` divides each group by its own scale.",
        (", keepdim=True", ""),
    ),
    _scales(
        "largest value, not largest magnitude",
        "Your scale comes from the largest value. A large negative value counts as much: take `abs()` first.",
        (".abs()", ""),
    ),
    _scales(
        "average instead of largest",
        "You take the mean magnitude of a group, so its larger half would be clamped. The ruler has to reach the "
        "largest one: `amax`.",
        (_ABSMAX, "groups.abs().mean(dim=-1, keepdim=True)"),
    ),
    _scales(
        "restricted range",
        "You divide by the largest code, which is the restricted range. Here all codes are used: divide by half of "
        "`2**bits - 1`.",
        (_HALF, "(2 ** (bits - 1) - 1)"),
    ),
    _scales(
        "half the number of codes",
        "You divide by half the number of codes. Between so many codes there is one step fewer: half of `2**bits - 1`.",
        (_HALF, "2 ** (bits - 1)"),
    ),
    _scales(
        "whole range over half the values",
        "You divide by all steps of the range, but absmax is only half of it: from zero to one end. Half of "
        "`2**bits - 1`.",
        (_HALF, "(2**bits - 1)"),
    ),
    _scales(
        "asymmetric range",
        "You lay the codes between the smallest and the largest value, which needs a zero point as well. Here the "
        "range is symmetric: from minus absmax to absmax.",
        (_ABSMAX, "(groups.amax(dim=-1, keepdim=True) - groups.amin(dim=-1, keepdim=True)) / 2"),
    ),
    _scales(
        "scale upside down",
        "Your result is how many steps a unit holds. A scale is the width of one step: divide absmax by the steps, not "
        "the other way round.",
        (f"absmax / {_HALF}", f"{_HALF} / absmax"),
    ),
)


def cases() -> list[tuple]:
    """Eight readable weights first; then matrices whose rows differ in size, as those of models do."""
    readable = torch.tensor([[0.8, -1.5, 0.3, 0.6], [0.02, 0.01, -0.03, 0.015]])
    made: list[tuple] = [(readable, 2, 4)]
    for seed, rows, columns, size, bits in [(0, 4, 12, 4, 4), (1, 8, 16, 8, 8), (2, 6, 12, 3, 3), (3, 8, 32, 4, 4)]:
        w = normal(seed, rows, columns) * 2.0 ** normal(seed + 10, rows, 1)
        made.append((w, size, bits))
    return made


GROUP_SCALES = Exercise(
    id="06-group-scales",
    title="Rulers in the wrong drawers",
    minutes=8,
    difficulty=2,
    task="""
`group_scales(w, group_size, bits)` in the cell below should give the scales of a weight `w` of shape (rows, columns),
one for every `group_size` neighbours in a row. The shapes are right, and the tutor's answers hardly suffer. Only its
KL, in INT4 with groups of 128, is four times what it should be, and large weights come out clipped. There are **two
faults** in it. Find and mend them. What it should do:

- `group_size` divides the number of columns, so each row has `columns // group_size` groups.
- A group's scale is its largest magnitude divided by half of the steps between the codes, `(2**bits - 1) / 2`: 7.5 for
  4 bits. That is the full range of lesson 02.
- Return shape (rows, groups, 1), so that the groups, of shape (rows, groups, group_size), can be divided by it.
""",
    function="group_scales",
    stub=SCALES_STUB,
    solution=SCALES,
    hints=(
        "Print `groups` for the first input, two rows of four. Which values share a scale? And does the scale of −1.5 "
        "and "
        "0.8 reach −1.5?",
        "Neighbours stay together if the *last* dimension of the reshape is the group. And a large negative value "
        "needs a "
        "long ruler, too.",
        "`w.reshape(rows, columns // group_size, group_size)`, and `groups.abs().amax(dim=-1, keepdim=True)`.",
    ),
    mistakes=_MISTAKES,
    cases=cases,
    parts=("scales",),
)

BITS_STUB = """\
def bits_per_weight(bits, group_size, scale_bits, zero_point_bits):
    raise NotImplementedError("replace this line")
"""

BITS = """\
def bits_per_weight(bits, group_size, scale_bits, zero_point_bits):
    return bits + (scale_bits + zero_point_bits) / group_size
"""


def _bits(name: str, message: str, formula: str) -> Mistake:
    return Mistake(name, message, altered(BITS, ("bits + (scale_bits + zero_point_bits) / group_size", formula)))


BITS_PER_WEIGHT = Exercise(
    id="06-bits-per-weight",
    title="What a weight really costs",
    minutes=3,
    difficulty=1,
    task="""
Write `bits_per_weight(bits, group_size, scale_bits, zero_point_bits)`: how many bits are stored per weight when every
`group_size` weights share one scale of `scale_bits` and one zero point of `zero_point_bits`.

`zero_point_bits` is 0 for symmetric quantization. The result is a float: `bits_per_weight(4, 128, 16, 0)` is 4.125.
""",
    function="bits_per_weight",
    stub=BITS_STUB,
    solution=BITS,
    hints=(
        "How many bits does one whole group take, codes and all?",
        "A group holds `group_size * bits` bits of codes, one scale and one zero point. Divide by its weights.",
        "The codes give `bits` for each weight; the scale and the zero point are shared by `group_size` of them.",
    ),
    mistakes=(
        _bits(
            "scale for every weight",
            "You give each weight a scale of its own. The weights of a group share one: divide by `group_size`.",
            "bits + scale_bits + zero_point_bits",
        ),
        _bits(
            "zero point forgotten",
            "Your sum leaves out the zero point. It is stored once for every group, just as the scale is.",
            "bits + scale_bits / group_size",
        ),
        _bits(
            "zero point not shared",
            "You divide only the scale by `group_size`. The zero point is shared by the whole group as well.",
            "bits + scale_bits / group_size + zero_point_bits",
        ),
        _bits(
            "scale not shared",
            "Division comes before addition: only the zero point is divided by `group_size`. Both are shared, so put "
            "their sum in parentheses.",
            "bits + scale_bits + zero_point_bits / group_size",
        ),
        _bits(
            "codes shared as well",
            "You divide the codes by `group_size` too. Each weight keeps its own code; only scale and zero point are "
            "shared.",
            "(bits + scale_bits + zero_point_bits) / group_size",
        ),
        _bits(
            "fraction cut off",
            "`//` (or `int`) cuts off the fraction, and the fraction is the overhead. Divide with `/`.",
            "bits + (scale_bits + zero_point_bits) // group_size",
        ),
        _bits(
            "scale in bytes",
            "You divide the scale and the zero point by 8, which makes bytes of them. All the others are bits: leave "
            "them so.",
            "bits + (scale_bits + zero_point_bits) / 8 / group_size",
        ),
        _bits(
            "only the overhead",
            "You give the overhead alone. The codes are stored as well: add `bits`.",
            "(scale_bits + zero_point_bits) / group_size",
        ),
        _bits(
            "bits of a whole group",
            "You give the bits of a whole group. Divide by the `group_size` weights that it holds.",
            "group_size * bits + scale_bits + zero_point_bits",
        ),
    ),
    cases=lambda: [(4, 128, 16, 4), (4, 32, 16, 4), (4, 128, 16, 0), (3, 64, 16, 3), (8, 256, 32, 8), (2, 16, 8, 0)],
)

EXERCISES = [GROUP_SCALES, BITS_PER_WEIGHT]
