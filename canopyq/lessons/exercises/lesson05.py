"""Lesson 05: what a token leaves behind, and how a block of keys becomes codes."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered, normal

BYTES_STUB = """\
def bytes_per_token(layers, heads, kv_heads, head_dim, bits):
    raise NotImplementedError("replace this line")
"""

BYTES = """\
def bytes_per_token(layers, heads, kv_heads, head_dim, bits):
    return 2 * layers * kv_heads * head_dim * bits / 8
"""


def _bytes(name: str, message: str, formula: str) -> Mistake:
    return Mistake(name, message, altered(BYTES, ("2 * layers * kv_heads * head_dim * bits / 8", formula)))


BYTES_PER_TOKEN = Exercise(
    id="05-bytes-per-token",
    title="What a token leaves behind",
    minutes=3,
    difficulty=1,
    task="""
Write `bytes_per_token(layers, heads, kv_heads, head_dim, bits)`: how many bytes the KV cache grows by with each token
of a chat.

- The model has `layers` layers. Each has `heads` query heads and `kv_heads` heads of keys and values, all of size
  `head_dim`.
- A number in the cache has `bits` bits; scales are left out. The result may have a fraction.
- For the tutor in BF16: `bytes_per_token(8, 4, 2, 64, 16)` is 4096.
""",
    function="bytes_per_token",
    stub=BYTES_STUB,
    solution=BYTES,
    hints=(
        "Which heads have something stored, and how many numbers does one of them store for a token?",
        "In each layer every KV head stores a key and a value of `head_dim` numbers. Query heads store nothing.",
        "Two times layers times KV heads times head_dim numbers, each of `bits / 8` bytes.",
    ),
    mistakes=(
        _bytes(
            "keys or values forgotten",
            "Your result is half of what is stored. Each head keeps two things for a token: a key *and* a value.",
            "layers * kv_heads * head_dim * bits / 8",
        ),
        _bytes(
            "query heads counted",
            "You count query heads. Queries are used once and thrown away; only the KV heads store something. That is "
            "what sharing them among several query heads is for.",
            "2 * layers * heads * head_dim * bits / 8",
        ),
        _bytes(
            "query heads counted, and only once",
            "You count query heads, which store nothing, and you count one number for each where a key *and* a value "
            "are stored. Use `kv_heads`, and 2.",
            "layers * heads * head_dim * bits / 8",
        ),
        _bytes(
            "all heads counted",
            "You add the query heads to those of keys and values. A key and a value for each *KV* head is all that is "
            "stored.",
            "layers * (heads + 2 * kv_heads) * head_dim * bits / 8",
        ),
        _bytes(
            "one layer only",
            "Your result is for a single layer. Every layer has keys and values of its own.",
            "2 * kv_heads * head_dim * bits / 8",
        ),
        _bytes(
            "head size forgotten",
            "You count one number a head. A key has `head_dim` numbers, and so has a value.",
            "2 * layers * kv_heads * bits / 8",
        ),
        _bytes(
            "bits, not bytes",
            "Your result is in bits. Eight of them are a byte.",
            "2 * layers * kv_heads * head_dim * bits",
        ),
        _bytes(
            "always two bytes",
            "You count two bytes a number whatever `bits` says. Use `bits / 8`.",
            "2 * layers * kv_heads * head_dim * 2",
        ),
        _bytes(
            "bits divided first",
            "`bits // 8` is 0 for 4 bits. Divide with `/`: two INT4 codes share a byte.",
            "2 * layers * kv_heads * head_dim * (bits // 8)",
        ),
        _bytes(
            "fraction cut off",
            "`//` (or `int`) cuts off the fraction: a cache of 4 bits may end in the middle of a byte. Divide with "
            "`/`.",
            "2 * layers * kv_heads * head_dim * bits // 8",
        ),
        _bytes(
            "heads divided",
            "You divide the query heads by the KV heads: that is how many queries share a key. What is stored goes "
            "with `kv_heads` itself.",
            "2 * layers * (heads / kv_heads) * head_dim * bits / 8",
        ),
    ),
    cases=lambda: [(8, 4, 2, 64, 16), (8, 4, 2, 64, 4), (32, 32, 32, 128, 16), (32, 32, 8, 128, 8), (80, 64, 8, 128, 4),
                   (3, 10, 5, 24, 2), (1, 3, 1, 5, 2), (3, 2, 1, 3, 2)],
)  # fmt: skip

KEYS = """\
def quantize_keys(keys, bits):
    low = keys.amin(dim=0, keepdim=True)
    high = keys.amax(dim=0, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    codes = ((keys - low) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, scale, low
"""

KEYS_STUB = altered(KEYS, ("dim=0", "dim=1"), ("(high - low) / (2**bits - 1)", "(high - low) / 2**bits"))  # two faults


def _keys(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(KEYS, *changes))


_SYMMETRIC = (
    "Your range runs from minus to plus the largest magnitude. Many key channels lie on one side of zero, and half of "
    "the "
    "codes would stay unused: take the smallest and the largest value."
)


def _no_offset(steps: str) -> tuple[tuple[str, str], ...]:
    """Symmetric codes as weights have them, with a scale that reaches the largest magnitude in so many steps."""
    return (
        ("low = keys.amin(dim=0, keepdim=True)", "high = keys.abs().amax(dim=0, keepdim=True)"),
        ("    high = keys.amax(dim=0, keepdim=True)\n", ""),
        ("(high - low) / (2**bits - 1)", f"high / ({steps})"),
        ("(keys - low)", "keys"),
        ("clamp(0, 2**bits - 1).to(torch.uint8)", "clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)"),
        ("scale, low", "scale, torch.zeros_like(scale)"),
    )


def key_cases() -> list[tuple]:
    """Four readable tokens first; then blocks whose channels differ in size and place, as keys do."""
    readable = torch.tensor([[0.1, 8.0, -3.0], [0.4, 9.5, -1.0], [-0.3, 8.7, -1.9], [0.2, 9.1, -2.2]])
    made: list[tuple] = [(readable, 2)]
    for seed, tokens, channels, bits in [(0, 6, 6, 2), (1, 64, 8, 4), (2, 64, 16, 2), (3, 16, 4, 8)]:
        place = 5 * normal(seed + 10, 1, channels)
        made.append((normal(seed, tokens, channels) * 2.0 ** normal(seed + 20, 1, channels) + place, bits))
    return made


KEY_BLOCK = Exercise(
    id="05-key-block",
    title="Keys that forget",
    minutes=8,
    difficulty=3,
    task="""
`quantize_keys(keys, bits)` in the cell below should quantize a block of keys of shape (tokens, channels) per
**channel**, asymmetric. Its scales are those that values should have, and too fine. There are **two faults** in it.
Find and mend them. What it should do:

- Every channel has a range of its own, from its smallest to its largest value among the tokens of the block. Code 0
  stands for the smallest, code `2**bits - 1` for the largest.
- Return `codes` (tokens, channels) as `torch.uint8`, from 0 to `2**bits - 1`, `scale` (1, channels) and `offset`
  (1, channels), so that `codes * scale + offset` is near `keys`.
- Compute in float32, and do not round scale and offset. No channel is constant.
""",
    function="quantize_keys",
    stub=KEYS_STUB,
    solution=KEYS,
    hints=(
        "Print the shapes of scale and offset. Then look at the codes of two bits: does the largest value of a channel "
        "get "
        "code 3 without the clamp?",
        "Tokens are the rows, so what is found along `dim=1` belongs to a token. And between `2**bits` codes there is "
        "one "
        "step fewer.",
        "`dim=0` at both ends, and `scale = (high - low) / (2**bits - 1)`.",
    ),
    mistakes=(
        _keys(
            "per token, not per channel",
            "You look along `dim=1`, so each *token* gets a range. That is right for values. Keys have channels that "
            "are large in every token, and they need a range for each channel: `dim=0`.",
            ("dim=0", "dim=1"),
        ),
        _keys(
            "one range for all",
            "You have a single range for the whole block. A channel that is large in every token then takes the codes "
            "of all others. Look along `dim=0`, the tokens.",
            ("keys.amin(dim=0, keepdim=True)", "keys.min().reshape(1, 1).expand(1, keys.shape[1])"),
            ("keys.amax(dim=0, keepdim=True)", "keys.max().reshape(1, 1).expand(1, keys.shape[1])"),
        ),
        _keys(
            "symmetric range",
            _SYMMETRIC,
            ("low = keys.amin(dim=0, keepdim=True)", "low = -keys.abs().amax(dim=0, keepdim=True)"),
            ("high = keys.amax(dim=0, keepdim=True)", "high = keys.abs().amax(dim=0, keepdim=True)"),
        ),
        _keys("symmetric range", _SYMMETRIC, *_no_offset("2 ** (bits - 1) - 1")),
        _keys("symmetric range", _SYMMETRIC, *_no_offset("(2**bits - 1) / 2")),
        _keys(
            "range stretched to zero",
            "Your range always contains zero. That is the rule for weights, where zero must stay exact. Here the "
            "offset is a real number, and a channel between 8 and 9 should spend its codes there.",
            ("keys.amin(dim=0, keepdim=True)", "keys.amin(dim=0, keepdim=True).clamp(max=0)"),
            ("keys.amax(dim=0, keepdim=True)", "keys.amax(dim=0, keepdim=True).clamp(min=0)"),
        ),
        _keys(
            "one step too many",
            "You divide by the number of codes. Between `2**bits` codes there is one step fewer.",
            ("(high - low) / (2**bits - 1)", "(high - low) / 2**bits"),
        ),
        _keys(
            "rounded down",
            "You cut off the fraction instead of rounding, so every value ends on the low side of its step.",
            (".round()", ".floor()"),
        ),
        _keys(
            "offset not subtracted",
            "You divide the keys themselves by the scale. Code 0 stands for the offset: subtract it first.",
            ("(keys - low) / scale", "keys / scale"),
        ),
        _keys(
            "signed codes",
            "Your codes are centred on zero. Here they start at 0, which stands for the offset.",
            (".to(torch.uint8)", ".sub(2 ** (bits - 1)).to(torch.int8)"),
        ),
        _keys(
            "offset in steps",
            "Your offset is a number of steps, as a zero point is. Here it is the value itself that code 0 stands for.",
            ("return codes, scale, low", "return codes, scale, low / scale"),
        ),
        _keys(
            "forgotten keepdim",
            "The numbers are right, and scale and offset have lost a dimension. Keep it with `keepdim=True`: shape "
            "(1, channels).",
            ("low = keys.amin(dim=0, keepdim=True)", "low = keys.amin(dim=0)"),
            ("high = keys.amax(dim=0, keepdim=True)", "high = keys.amax(dim=0)"),
        ),
    ),
    cases=key_cases,
    parts=("codes", "scale", "offset"),
    integers=("codes",),
)

EXERCISES = [BYTES_PER_TOKEN, KEY_BLOCK]
