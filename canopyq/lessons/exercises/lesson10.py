"""Lesson 10: where the arithmetic takes over, and four bits made a float by setting bits."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered

TOKENS_STUB = """\
def tokens_until_arithmetic(bits_per_weight, bytes_per_s, operations_per_s):
    raise NotImplementedError("replace this line")
"""

TOKENS = """\
def tokens_until_arithmetic(bits_per_weight, bytes_per_s, operations_per_s):
    seconds_to_read = bits_per_weight / 8 / bytes_per_s
    seconds_per_token = 2 / operations_per_s
    return seconds_to_read / seconds_per_token
"""


def _tokens(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(TOKENS, *changes))


TOKENS_MISTAKES = (
    _tokens(
        "bits taken for bytes",
        "The memory's rate is in bytes, and your weight is in bits. Eight bits are a byte.",
        ("bits_per_weight / 8", "bits_per_weight"),
    ),
    _tokens(
        "one operation a weight",
        "A weight and an input are multiplied *and* added to a sum: two operations for each weight and token.",
        ("2 / operations_per_s", "1 / operations_per_s"),
    ),
    _tokens(
        "upside down",
        "Your result grows when the memory gets faster. A faster memory needs fewer tokens to keep the arithmetic "
        "busy, so something is divided the wrong way round.",
        ("seconds_to_read / seconds_per_token", "seconds_per_token / seconds_to_read"),
    ),
    _tokens(
        "always 16 bits",
        "Your result is the same for INT4 and BF16. A smaller weight is read sooner: the bits belong into the sum.",
        ("bits_per_weight / 8", "2"),
    ),
)

FIRST = Exercise(
    id="10-arithmetic-takes-over",
    title="How many tokens keep the tensor cores busy?",
    minutes=6,
    difficulty=2,
    task="""
Write `tokens_until_arithmetic(bits_per_weight, bytes_per_s, operations_per_s)`: the number of tokens in a batch at
which the arithmetic of a large layer takes exactly as long as reading its weights.

- Look at a single weight. It is read once, whatever the batch: `bits_per_weight` bits at `bytes_per_s` bytes a second.
- For each token it takes part in one multiplication and one addition, at `operations_per_s` operations a second.
- Leave inputs and outputs out: next to the weights of a large layer they are small.
- Return a plain number; it need not be whole.
""",
    function="tokens_until_arithmetic",
    stub=TOKENS_STUB,
    solution=TOKENS,
    hints=(
        "Write down two times for one weight: the time to read it, and the time of its arithmetic for one token.",
        "Reading takes bytes / (bytes per second), so first turn bits into bytes. The arithmetic of one token is two "
        "operations.",
        "The batch is as large as the ratio of the two times: `(bits_per_weight / 8 / bytes_per_s)` divided by "
        "`(2 / operations_per_s)`.",
    ),
    mistakes=TOKENS_MISTAKES,
    cases=lambda: [(16, 4e12, 800e12), (4, 4e12, 800e12), (4.125, 4.57e12, 700e12), (8, 100e9, 3e12), (16, 1e12, 2e12)],
)

FLOATS_STUB = """\
def floats_of_word(word):
    raise NotImplementedError("replace this line")
"""

FLOATS = """\
def floats_of_word(word):
    codes = [(word >> (4 * i)) & 0xF for i in range(8)]
    bits = torch.tensor([0x4300 | code for code in codes], dtype=torch.int16)
    values = bits.view(torch.bfloat16) - 136
    return bits, values.float()
"""


def _floats(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(FLOATS, *changes))


FLOATS_MISTAKES = (
    _floats(
        "the offset forgotten",
        "Your values run from 0 to 15. The bits say 128 + code, and the code is 8 above the value: subtract 128 + 8.",
        ("- 136", "- 128"),
    ),
    _floats(
        "nothing subtracted",
        "Your values lie between 128 and 143. That is the number whose last bits you have set; now take 136 away.",
        (" - 136", ""),
    ),
    _floats(
        "the other weights' bits kept",
        "You shift the word and keep all that is left. Only the lowest four bits are the code: `& 0xF`.",
        ("(word >> (4 * i)) & 0xF", "(word >> (4 * i)) & 0x7FFF"),
    ),
    _floats(
        "nibbles from the wrong end",
        "The numbers are right and stand in the wrong order: the first weight lies in the *lowest* four bits.",
        ("4 * i", "28 - 4 * i"),
    ),
    _floats(
        "the constant of float16",
        "0x6400 is 1024 in float16. Read as bfloat16 it is an enormous number. In bfloat16 128 is 0x4300.",
        ("0x4300", "0x6400"),
    ),
)


def words() -> list[tuple]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 2**31, (4,), generator=generator).tolist()
    return [(0x76543210,), (0xFEDCBA98,), (0x88888888,), *((word,) for word in drawn)]


SECOND = Exercise(
    id="10-floats-of-a-word",
    title="Eight weights out of one word",
    minutes=8,
    difficulty=3,
    task="""
Write `floats_of_word(word)`: the eight INT4 weights in a 32-bit word (a Python int) by the trick of the kernel. Return
two tensors of shape (8,): `bits`, the int16 patterns that you set, and `values`, the float32 numbers that come out.

- The first weight lies in the lowest four bits. A code `u` from 0 to 15 stands for the value `u - 8`.
- Do not convert the code. Set its bits into the bits of 128 in bfloat16, `0x4300`, and read the result as bfloat16: it
  is 128 + u. Then subtract what is too much.
- `torch.tensor(n, dtype=torch.int16).view(torch.bfloat16)` reads 16 bits as bfloat16.
""",
    function="floats_of_word",
    stub=FLOATS_STUB,
    solution=FLOATS,
    hints=(
        "First get at one code: shift the word down, keep four bits.",
        "`0x4300 | code` are the bits of 128 + code. How much above the value is that?",
        "`bits = torch.tensor([0x4300 | code for code in codes], dtype=torch.int16)`, then "
        "`bits.view(torch.bfloat16) - 136`.",
    ),
    mistakes=FLOATS_MISTAKES,
    cases=words,
    parts=("bits", "values"),
    integers=("bits",),
)

EXERCISES = [FIRST, SECOND]
