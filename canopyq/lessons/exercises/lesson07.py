"""Lesson 07: eight codes to a word, and what a layer takes on disk."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered

PACK = """\
def pack_words(codes):
    nibbles = (codes + 8).to(torch.uint8)
    pairs = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return pairs.view(torch.int32)
"""

PACK_STUB = altered(  # two faults
    PACK,
    ("(codes + 8).to(torch.uint8)", "(codes & 15).to(torch.uint8)"),
    ("nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)", "nibbles[:, 1::2] | (nibbles[:, 0::2] << 4)"),
)


def _pack(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(PACK, *changes))


_OFFSET = "(codes + 8).to(torch.uint8)"
_PAIRS = "nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)"
_WORDS = "pairs.view(torch.int32)"
_PACK_MISTAKES = (
    _pack(
        "nibbles swapped",
        "In each byte your first code lies in the high half. The first of two codes belongs into the **low** half, the "
        "second one is shifted: `first | (second << 4)`.",
        (_PAIRS, "nibbles[:, 1::2] | (nibbles[:, 0::2] << 4)"),
    ),
    _pack(
        "sign bits kept",
        "You keep the low four bits of a signed code, so −1 becomes 15 (two's complement). This format stores "
        "code + 8: −8 becomes 0, and −1 becomes 7.",
        (_OFFSET, "(codes & 15).to(torch.uint8)"),
    ),
    _pack(
        "offset of seven",
        "You add 7, so the lowest code, −8, falls below zero and wraps around. Add 8, which is `2**(bits - 1)`.",
        (_OFFSET, "((codes + 7) & 15).to(torch.uint8)"),
    ),
    _pack(
        "no shift",
        "Both codes of a pair land on the same four bits. Shift the second one up by four: `second << 4`.",
        (_PAIRS, "nibbles[:, 0::2] | nibbles[:, 1::2]"),
    ),
    _pack(
        "halves instead of neighbours",
        "You pair the first half of a row with its second half. Here **neighbours** share a byte: every other code, "
        "`0::2`, with the one after it, `1::2`.",
        (_PAIRS, "nibbles[:, : codes.shape[1] // 2] | (nibbles[:, codes.shape[1] // 2 :] << 4)"),
    ),
    _pack(
        "packed down the columns",
        "You pair codes of neighbouring *rows*. A weight is packed along its rows: `nibbles[:, 0::2]`, not "
        "`nibbles[0::2]`.",
        (_PAIRS, "nibbles[0::2] | (nibbles[1::2] << 4)"),
    ),
    _pack(
        "first code at the top",
        "Your words hold the right eight codes in the opposite order, the first one in the highest bits. The first "
        "code belongs into the lowest four bits of the word.",
        (_PAIRS, "(nibbles.flip(1)[:, 0::2] | (nibbles.flip(1)[:, 1::2] << 4)).reshape(len(codes), -1, 4).flip(1)"
                 ".reshape(len(codes), -1)"),
    ),
    _pack(
        "bytes, not words",
        "The bytes are right. Four of them make a word: `pairs.view(torch.int32)` reads them so, without copying.",
        (_WORDS, "pairs"),
    ),
    _pack(
        "words without a sign",
        "The bits are right, as numbers from 0 to 2^32 − 1. The file has int32, in which a word whose highest bit is "
        "set is negative: `pairs.view(torch.int32)`.",
        (_WORDS, "pairs.view(torch.int32).long() & 0xFFFFFFFF"),
    ),
    _pack(
        "not packed",
        "You return one number for each code. Eight codes of four bits share a word.",
        (_WORDS, "nibbles.to(torch.int32)"),
    ),
)  # fmt: skip


def cases() -> list[tuple]:
    """Worked values first, then random codes; an even number of rows, so that packing the wrong way runs too."""
    worked = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7], [0, 0, 0, 0, 0, 0, 0, -8]], dtype=torch.int8)
    made: list[tuple] = [(worked,)]
    for seed, rows, columns in [(0, 2, 16), (1, 4, 32), (2, 6, 8), (3, 8, 64)]:
        generator = torch.Generator().manual_seed(seed)
        made.append((torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8),))
    return made


PACK_WORDS = Exercise(
    id="07-pack-words",
    title="Only its author can read it",
    minutes=8,
    difficulty=3,
    task="""
`pack_words(codes)` in the cell below should pack INT4 codes as checkpoints store them. Its author unpacks what he has
packed and gets every code back. A server reads the same file and the model talks nonsense: the bits are not where the
format has them. There are **two faults** in it. Find and mend them. What it should do:

- `codes` is int8 of shape (rows, columns), from −8 to 7; 8 divides the number of columns.
- Add 8, so that every code is one of 0 … 15. Two neighbours share a byte, the **first in the low half**.
- Four bytes make a word. Return int32 of shape (rows, columns // 8).

The row −8, −7, −1, 0, 1, 2, 6, 7 gives the one word −22444272, which is FEA98710 in hexadecimal.
""",
    function="pack_words",
    stub=PACK_STUB,
    solution=PACK,
    hints=(
        "Print your word for the row of the task in hexadecimal, `hex(word & 0xFFFFFFFF)`, and hold it against "
        "FEA98710. Read "
        "from its end that has the eight codes plus 8, in their order: 0, 1, 7, 8, 9, A, E, F.",
        "`& 15` keeps the low bits of a signed code, so −1 becomes 15. It should become 7. And which code of a pair is "
        "shifted into the high half?",
        "`(codes + 8).to(torch.uint8)`, and `nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)`.",
    ),
    mistakes=_PACK_MISTAKES,
    cases=cases,
    parts=("words",),
    integers=("words",),
)

BYTES_STUB = """\
def layer_bytes(rows, columns, group_size, asymmetric):
    raise NotImplementedError("replace this line")
"""

BYTES = """\
def layer_bytes(rows, columns, group_size, asymmetric):
    groups = columns // group_size
    codes = 4 * rows * math.ceil(columns / 8)
    scales = 2 * rows * groups
    zero_points = 4 * math.ceil(rows / 8) * groups if asymmetric else 0
    shape = 2 * 8
    return codes + scales + zero_points + shape
"""


def _bytes(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(BYTES, *changes))


_ZERO = "4 * math.ceil(rows / 8) * groups if asymmetric else 0"
_LEFT_OVER = (
    "`//` rounds down, so what is left over at the end of a row, or below the last eight rows, has no word. It takes a "
    "whole "
    "one: round up, `math.ceil(columns / 8)`."
)
LAYER_BYTES = Exercise(
    id="07-layer-bytes",
    title="To the byte",
    minutes=6,
    difficulty=2,
    task="""
Write `layer_bytes(rows, columns, group_size, asymmetric)`: how many bytes one INT4 weight of (rows, columns) takes in a
checkpoint, all of its tensors together.

- `weight_packed`: int32, eight codes to a word along each row. What is left over at the end of a row takes a word too.
- `weight_scale`: 16 bits, one for every `group_size` neighbours of a row. `group_size` divides `columns`.
- `weight_zero_point`, if `asymmetric`: one 4-bit code for each scale, packed **down the rows**: eight rows to a word,
  and again a word for what is left over.
- `weight_shape`: two int64.

`layer_bytes(256, 1024, 128, False)` is 135184.
""",
    function="layer_bytes",
    stub=BYTES_STUB,
    solution=BYTES,
    hints=(
        "Four tensors, four sums. For each: how many elements does it have, and how many bytes is one?",
        "A row of 60 codes takes `math.ceil(60 / 8)` words, which is 8, and a word has 4 bytes. For the zero points "
        "the same happens along the other side of the matrix.",
        "Codes `4 * rows * math.ceil(columns / 8)`, scales `2 * rows * groups`, zero points "
        "`4 * math.ceil(rows / 8) * groups`, and 16 bytes for the shape.",
    ),
    mistakes=(
        _bytes(
            "scales of 8 bits",
            "You count one byte a scale. Scales have 16 bits here, two bytes each. (With 8 bits the scales of a 7B "
            "model would take 55 MB instead of 109.)",
            ("2 * rows * groups", "rows * groups"),
        ),
        _bytes(
            "scales of 32 bits",
            "You count four bytes a scale. They have 16 bits here, two bytes each.",
            ("2 * rows * groups", "4 * rows * groups"),
        ),
        _bytes(
            "one row of scales",
            "You count the scales of a single row. Each of the `rows` rows has `groups` of its own.",
            ("2 * rows * groups", "2 * groups"),
        ),
        _bytes(
            "a byte for each code",
            "You count a byte for each code. Eight codes of four bits share a word of four bytes.",
            ("4 * rows * math.ceil(columns / 8)", "rows * columns"),
        ),
        _bytes(
            "half a word at the end of a row",
            "You count half a byte for each code and no padding. Every row ends with a whole word: "
            "`4 * math.ceil(columns / 8)` bytes.",
            ("4 * rows * math.ceil(columns / 8)", "rows * columns // 2"),
        ),
        _bytes(
            "what is left over has no word",
            _LEFT_OVER,
            ("math.ceil(columns / 8)", "(columns // 8)"),
            ("math.ceil(rows / 8)", "(rows // 8)"),
        ),
        _bytes("what is left over has no word", _LEFT_OVER, ("math.ceil(columns / 8)", "(columns // 8)")),
        _bytes("what is left over has no word", _LEFT_OVER, ("math.ceil(rows / 8)", "(rows // 8)")),
        _bytes(
            "words without their bytes",
            "You count words. A word has four bytes.",
            ("4 * rows * math.ceil(columns / 8)", "rows * math.ceil(columns / 8)"),
        ),
        _bytes(
            "zero points forgotten",
            "Your sum leaves out the zero points. When `asymmetric`, there is one for each scale.",
            (_ZERO, "0"),
        ),
        _bytes(
            "zero points always there",
            "You count zero points for symmetric weights too. Those have none: the tensor is not in the file.",
            (_ZERO, "4 * math.ceil(rows / 8) * groups"),
        ),
        _bytes(
            "zero points of a byte",
            "You count a byte for each zero point. They are 4-bit codes and packed like them, eight to a word.",
            (_ZERO, "rows * groups if asymmetric else 0"),
        ),
        _bytes(
            "zero points packed along the row",
            "You pack the zero points along the groups of a row. They are packed down the rows: "
            "`math.ceil(rows / 8)` words for each group.",
            (_ZERO, "4 * rows * math.ceil(groups / 8) if asymmetric else 0"),
        ),
        _bytes(
            "shape forgotten",
            "You are 16 bytes short: `weight_shape` is in the file as well, two int64.",
            ("2 * 8", "0"),
        ),
        _bytes(
            "bits",
            "You give bits. Divide by 8.",
            ("codes + scales + zero_points + shape", "8 * (codes + scales + zero_points + shape)"),
        ),
    ),
    cases=lambda: [(256, 1024, 128, False), (256, 1024, 128, True), (64, 96, 32, True), (10, 60, 20, True),
                   (12, 36, 12, False), (4, 20, 10, True)],
    integers=("result",),
)  # fmt: skip

EXERCISES = [PACK_WORDS, LAYER_BYTES]
