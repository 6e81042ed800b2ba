"""Lesson 12: the perplexity of a text, and an adapter merged into the codes that it was trained on."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered, normal

PERPLEXITY_STUB = """\
def perplexity(logits, ids):
    raise NotImplementedError("replace this line")
"""

PERPLEXITY = """\
def perplexity(logits, ids):
    log_p = logits[:-1].log_softmax(-1)
    of_next = log_p.gather(1, ids[1:, None])
    return torch.exp(-of_next.mean())
"""


def _perplexity(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(PERPLEXITY, *changes))


PERPLEXITY_MISTAKES = (
    _perplexity(
        "the token that is already there",
        "You look up the token at the same position. A model has read that one: its logits at position `i` are about "
        "the token at `i + 1`.",
        ("logits[:-1]", "logits"),
        ("ids[1:, None]", "ids[:, None]"),
    ),
    _perplexity(
        "the token before",
        "You look one token back. The logits at position `i` are about `ids[i + 1]`, not about `ids[i - 1]`.",
        ("logits[:-1]", "logits[1:]"),
        ("ids[1:, None]", "ids[:-1, None]"),
    ),
    _perplexity(
        "a sum for a mean",
        "Your number grows with the length of the text. Perplexity is of one token: take the mean before the `exp`.",
        ("of_next.mean()", "of_next.sum()"),
    ),
    _perplexity(
        "a mean of exponentials",
        "You take `exp` of every token and then the mean, so that a single surprise decides. Mean first, `exp` then.",
        ("torch.exp(-of_next.mean())", "torch.exp(-of_next).mean()"),
    ),
    _perplexity(
        "the exponential forgotten",
        "That is the cross-entropy, in nats. Perplexity is its `exp`: between how many tokens the model hesitates.",
        ("torch.exp(-of_next.mean())", "-of_next.mean()"),
    ),
    _perplexity(
        "the sign",
        "Your number is below 1. A logarithm of a probability is negative: the minus makes a surprise of it.",
        ("-of_next.mean()", "of_next.mean()"),
    ),
    _perplexity(
        "another base",
        "The logarithm is to the base e and your power to the base 2. Both have to be of one base.",
        ("torch.exp(-of_next.mean())", "2 ** -of_next.mean()"),
    ),
)


def texts() -> list[tuple]:
    generator = torch.Generator().manual_seed(0)
    small = (torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 1]]), torch.tensor([2, 0, 1]))
    drawn = [
        (3 * normal(seed, length, 11), torch.randint(0, 11, (length,), generator=generator))
        for seed, length in ((1, 4), (2, 9), (3, 30))
    ]
    return [small, *drawn]


FIRST = Exercise(
    id="12-perplexity",
    title="How surprised is it?",
    minutes=6,
    difficulty=2,
    task="""
Write `perplexity(logits, ids)`: the perplexity of a text, as a number.

- `ids` (tokens,) is the text. `logits` (tokens, vocabulary) is what the model said at each position: row `i` is about
  the token *after* position `i`, which the model has not seen.
- So the first token is predicted by nothing, and the last row of logits has no token to be compared with.
- Perplexity is `exp` of the mean of -log p, where p is the probability that the model gave to the token that came.
""",
    function="perplexity",
    stub=PERPLEXITY_STUB,
    solution=PERPLEXITY,
    hints=(
        "Which rows of `logits` speak of which entries of `ids`? Write both as slices, equally long.",
        "`logits[:-1]` speak of `ids[1:]`. `log_softmax(-1)` gives log-probabilities; `gather` picks one a row.",
        "`of_next = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])`; then `exp` of minus its mean.",
    ),
    mistakes=PERPLEXITY_MISTAKES,
    cases=texts,
)

MERGE = """\
def merged(codes, scale, a, b, alpha):
    weight = codes * scale
    return weight + (alpha / a.shape[0]) * (b @ a)
"""

MERGE_STUB = altered(
    MERGE, ("weight + (alpha / a.shape[0]) * (b @ a)", "weight + alpha * (b @ a).T.reshape(weight.shape)")
)


def _merge(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(MERGE, *changes))


MERGE_MISTAKES = (
    _merge(
        "alpha not divided by the rank",
        "LoRA scales its adapter by `alpha / rank`, so that a higher rank does not mean a stronger adapter. Yours is "
        "`rank` times too strong.",
        ("alpha / a.shape[0]", "alpha"),
    ),
    _merge(
        "numbers in the wrong places",
        "The product is right and lies in the wrong places: `b @ a` is (out, in) already. Turned over and reshaped, "
        "every number goes to another weight.",
        ("(b @ a)", "(b @ a).T.reshape(weight.shape)"),
    ),
    _merge(
        "added to the codes",
        "You add the adapter before the scale. It was trained beside the *weights* that the codes stand for, so "
        "dequantize first.",
        ("weight = codes * scale", "weight = codes"),
        ("weight + (alpha / a.shape[0]) * (b @ a)", "(weight + (alpha / a.shape[0]) * (b @ a)) * scale"),
    ),
    _merge(
        "rounded back onto the old grid",
        "You round the sum with the old scales. Most of an adapter is smaller than a step, and so most of it is lost: "
        "return the sum, and let the next quantization choose new scales.",
        (
            "return weight + (alpha / a.shape[0]) * (b @ a)",
            "return torch.round((weight + alpha / a.shape[0] * (b @ a)) / scale) * scale",
        ),
    ),
    _merge(
        "the adapter left out",
        "That is the dequantized weight alone. The adapter `b @ a`, scaled, has to be added.",
        ("weight + (alpha / a.shape[0]) * (b @ a)", "weight"),
    ),
)


def adapters() -> list[tuple]:
    generator = torch.Generator().manual_seed(0)

    def layer(seed: int, out: int, inputs: int, rank: int, alpha: float) -> tuple:
        codes = torch.randint(-8, 8, (out, inputs), generator=generator).float()
        return (
            codes,
            0.1 * normal(seed, out, 1).abs() + 0.05,
            normal(seed + 1, rank, inputs),
            normal(seed + 2, out, rank),
            alpha,
        )

    small = (torch.tensor([[1.0, -2, 3], [0, 4, -8]]), torch.tensor([[0.5], [0.25]]))
    ones = (torch.tensor([[1.0, 0, 0], [0, 1, 0]]), torch.tensor([[0.25, 0.5], [0.0, 1.0]]), 4)
    return [(*small, *ones), layer(1, 4, 6, 2, 8), layer(5, 8, 16, 4, 16), layer(9, 3, 5, 2, 1)]


SECOND = Exercise(
    id="12-merge",
    title="An adapter that ruins the model",
    minutes=8,
    difficulty=3,
    task="""
A colleague merges LoRA adapters into quantized layers. Beside the codes an adapter works; merged, the model talks
nonsense. Mend `merged(codes, scale, a, b, alpha)`, which has **two faults**.

- `codes` (out, in) and `scale` (out, 1) are the quantized weight; `a` (rank, in) and `b` (out, rank) the adapter.
- While it was trained, the layer gave `Q(x) + (alpha / rank) · b a x`. The merged weight (out, in), in plain
  floats, has to give the same.
""",
    function="merged",
    stub=MERGE_STUB,
    solution=MERGE,
    hints=(
        "What shape does `b @ a` have, and what shape has a weight? And how strong was the adapter in training?",
        "`b @ a` is (out, in) as it stands. The rank is how many rows `a` has.",
        "`return weight + (alpha / a.shape[0]) * (b @ a)`.",
    ),
    mistakes=MERGE_MISTAKES,
    cases=adapters,
)

EXERCISES = [FIRST, SECOND]
