"""Lesson 03: what a quantized layer computes, and what a quantized model weighs."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered, normal

FORWARD = """\
def quantized_linear(x, codes, scale, bias):
    group_size = codes.shape[1] // scale.shape[1]
    weight = codes * scale.repeat_interleave(group_size, dim=1)
    return x @ weight.T + bias
"""

FORWARD_STUB = altered(  # two faults
    FORWARD,
    ("scale.repeat_interleave(group_size, dim=1)", "scale.repeat(1, group_size)"),
    (" + bias", " + bias * scale[:, 0]"),
)


_SCALES = "scale.repeat_interleave(group_size, dim=1)"


def _forward(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(FORWARD, *changes))


def cases() -> list[tuple]:
    """Two outputs of four inputs in groups of two first; then random layers, with one group a row and with many."""
    x = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    codes = torch.tensor([[7, -8, 1, 0], [2, 3, -4, 5]], dtype=torch.int8)
    made: list[tuple] = [(x, codes, torch.tensor([[0.1, 0.5], [0.2, 1.0]]), torch.tensor([0.25, -1.0]))]
    for seed, m, n, k, groups in [(0, 3, 4, 12, 3), (1, 2, 6, 16, 1), (2, 5, 3, 20, 5), (3, 1, 8, 32, 4)]:
        codes = (3 * normal(seed, n, k)).round().clamp(-8, 7).to(torch.int8)
        scale = normal(seed + 10, n, groups).abs() + 0.1
        made.append((normal(seed + 20, m, k), codes, scale, normal(seed + 30, n)))
    return made


QUANTIZED_LINEAR = Exercise(
    id="03-quantized-linear",
    title="A layer that passes every exam",
    minutes=8,
    difficulty=2,
    task="""
`quantized_linear(x, codes, scale, bias)` in the cell below is somebody's forward pass of a quantized layer. Nothing
raises, the shapes are right, and with one scale a row and no bias it passed all tests. With groups of 128 it passed an
exam, too: the tutor in INT4 still gets nearly all answers right. But its KL is eight times what it should be. There are
**two faults** in it. Find and mend them.

- `x` has shape (tokens, in_features), `bias` has shape (out_features,). Both are ordinary floats.
- `codes` has shape (out_features, in_features): signed whole numbers, unpacked already.
- `scale` has shape (out_features, groups). Each row of `codes` is cut into `groups` runs of neighbours of equal length,
  and each run has its scale, in order.
- Return shape (tokens, out_features).
""",
    function="quantized_linear",
    stub=FORWARD_STUB,
    solution=FORWARD,
    hints=(
        "Print what each code is multiplied by, for the first row of the first input. Which scale should it be?",
        "A scale serves a run of neighbours: a a a b b b, not a b a b a b. And what of all this was never quantized?",
        "`scale.repeat_interleave(group_size, dim=1)`, and `+ bias` as it is.",
    ),
    mistakes=(
        _forward(
            "scales in turns",
            "`repeat` lays the whole row of scales down again and again: a b a b. A group is a run of neighbours, so "
            "it has to be a a b b: `repeat_interleave`.",
            (_SCALES, "scale.repeat(1, group_size)"),
        ),
        _forward(
            "first scale for the whole row",
            "You use the first group's scale for the whole row. Every group has its own.",
            (_SCALES, "scale[:, :1]"),
        ),
        _forward(
            "average of the scales",
            "You average the scales of a row. Each belongs to one group and to no other.",
            (_SCALES, "scale.mean(dim=1, keepdim=True)"),
        ),
        _forward(
            "divided by the scale",
            "You divide by the scale. That is the way *to* the codes; the way back multiplies.",
            (f"codes * {_SCALES}", f"codes / {_SCALES}"),
        ),
        _forward(
            "scale forgotten",
            "You multiply by the codes themselves. They are counts of steps: multiplied by the scale they are weights.",
            (f"codes * {_SCALES}", "codes.to(x.dtype)"),
        ),
        _forward(
            "offset taken off twice",
            "You subtract 8 from the codes. Packed codes carry that offset; these are signed already, from -8 to 7.",
            (f"codes * {_SCALES}", f"(codes - 8.0) * {_SCALES}"),
        ),
        _forward(
            "bias forgotten", "The bias is missing: it stays in full precision and is added last.", (" + bias", "")
        ),
        _forward(
            "bias scaled",
            "You multiply the bias by a scale. It was never quantized: add it as it is.",
            ("+ bias", "+ bias * scale[:, 0]"),
        ),
    ),
    cases=cases,
    parts=("output",),
)

BYTES_STUB = """\
def model_bytes(linear, other, bits, group_size):
    raise NotImplementedError("replace this line")
"""

BYTES = """\
def model_bytes(linear, other, bits, group_size):
    return linear * (bits + 16 / group_size) / 8 + other * 2
"""


def _bytes(name: str, message: str, formula: str) -> Mistake:
    return Mistake(name, message, altered(BYTES, ("linear * (bits + 16 / group_size) / 8 + other * 2", formula)))


MODEL_BYTES = Exercise(
    id="03-model-bytes",
    title="What the whole model weighs",
    minutes=4,
    difficulty=2,
    task="""
Write `model_bytes(linear, other, bits, group_size)`: the bytes of a model of which only the linear layers are
quantized.

- `linear` is how many weights those layers have. Each is kept in `bits` bits, and every `group_size` of them share a
  scale of 16 bits.
- `other` is how many parameters are left as they are: embedding, head and norms, in BF16.
- The result is a float. Llama-2-7B has 6,476,005,376 linear weights and 262,410,240 others:
  `model_bytes(6476005376, 262410240, 4, 128)` is 3864010752, or 3.86 GB.
""",
    function="model_bytes",
    stub=BYTES_STUB,
    solution=BYTES,
    hints=(
        "Two kinds of parameters, two prices. What does one of each kind cost?",
        "A linear weight costs `bits + 16 / group_size` bits, a BF16 parameter two bytes. Mind the unit.",
        "`linear * (bits + 16 / group_size) / 8` bytes for the layers; add two bytes for each of the others.",
    ),
    mistakes=(
        _bytes(
            "everything quantized",
            "You give all parameters the low price. Embedding, head and norms stay in BF16, two bytes each.",
            "(linear + other) * (bits + 16 / group_size) / 8",
        ),
        _bytes(
            "the others forgotten",
            "You count the linear layers alone. What is not quantized has to be loaded as well.",
            "linear * (bits + 16 / group_size) / 8",
        ),
        _bytes(
            "scales forgotten",
            "Your sum has no scales in it. Every `group_size` weights share one of 16 bits.",
            "linear * bits / 8 + other * 2",
        ),
        _bytes(
            "scale for every weight",
            "You give each weight a scale of its own. `group_size` of them share one.",
            "linear * (bits + 16) / 8 + other * 2",
        ),
        _bytes(
            "bits, not bytes",
            "Your result is in bits, eight times too large: bytes are asked for.",
            "linear * (bits + 16 / group_size) + other * 16",
        ),
        _bytes(
            "linear layers in bits",
            "The linear layers are counted in bits and the others in bytes. Divide the first by 8.",
            "linear * (bits + 16 / group_size) + other * 2",
        ),
        _bytes(
            "the others' bytes taken for bits",
            "You divide everything by 8, but two bytes for a BF16 number are bytes already. Divide the linear layers "
            "alone.",
            "(linear * (bits + 16 / group_size) + other * 2) / 8",
        ),
        _bytes(
            "fraction cut off",
            "`//` (or `int`) cuts off the fraction: three codes of 3 bits end in the middle of a byte. Divide with "
            "`/`.",
            "linear * (bits + 16 / group_size) // 8 + other * 2",
        ),
        _bytes(
            "the others in bits",
            "The linear layers are counted in bytes and the others in bits. 16 bits are two bytes.",
            "linear * (bits + 16 / group_size) / 8 + other * 16",
        ),
        _bytes(
            "one byte for BF16",
            "You count one byte for a BF16 number. It has 16 bits: two bytes.",
            "linear * (bits + 16 / group_size) / 8 + other",
        ),
        _bytes(
            "four bytes for BF16",
            "Four bytes a parameter is FP32. In BF16 it is two.",
            "linear * (bits + 16 / group_size) / 8 + other * 4",
        ),
        _bytes(
            "scales counted in bytes",
            "A scale of two bytes was added to codes counted in bits. Take 16 bits, then divide everything by 8.",
            "linear * (bits + 2 / group_size) / 8 + other * 2",
        ),
    ),
    cases=lambda: [
        (6_476_005_376, 262_410_240, 4, 128),
        (7_864_320, 332_032, 4, 128),
        (7_864_320, 332_032, 8, 256),
        (1_000_000, 50_000, 2, 32),
        (640_000, 64_000, 3, 64),
        (1_001, 10, 3, 128),
        (77, 3, 4, 32),
    ],
)

EXERCISES = [QUANTIZED_LINEAR, MODEL_BYTES]
