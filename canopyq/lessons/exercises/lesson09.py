"""Lesson 09: a second weight that makes up for the first, and columns made larger before rounding."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered, clear_of_ties, normal

PAIR_STUB = """\
def round_pair(w, hessian, scale):
    raise NotImplementedError("replace this line")
"""

PAIR = """\
def round_pair(w, hessian, scale):
    first = torch.round(w[0] / scale) * scale
    error = w[0] - first
    second = w[1] + error * hessian[0, 1] / hessian[1, 1]
    return torch.stack([first, torch.round(second / scale) * scale])
"""


def _pair(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(PAIR, *changes))


PAIR_MISTAKES = (
    _pair(
        "codes, not weights",
        "You return how many steps the two weights are. Multiply by `scale` to come back to weights.",
        ("torch.round(w[0] / scale) * scale", "torch.round(w[0] / scale)"),
        ("error = w[0] - first", "error = w[0] - first * scale"),
        ("torch.round(second / scale) * scale", "torch.round(second / scale)"),
    ),
    _pair(
        "second weight not rounded",
        "You move the second weight and leave it there. It has to lie on the grid as well: round it like the first.",
        ("torch.round(second / scale) * scale", "second"),
    ),
    _pair(
        "each weight alone",
        "You round both to nearest. That is right for each weight and not for their sum: let the second make up for "
        "the error of the first.",
        ("w[1] + error * hessian[0, 1] / hessian[1, 1]", "w[1]"),
    ),
    _pair(
        "moved the wrong way",
        "If the first weight came out too small (error above zero) and both inputs rise together, the second has to "
        "become larger, not smaller.",
        ("w[1] + error", "w[1] - error"),
    ),
    _pair(
        "divided by the wrong input",
        "The second weight acts through its own input. Divide by `hessian[1, 1]`, how loud that one is.",
        ("hessian[1, 1]", "hessian[0, 0]"),
    ),
    _pair(
        "the correlation forgotten",
        "You pass on the whole error. Only as much can be made up for as the inputs go together: "
        "`hessian[0, 1] / hessian[1, 1]`.",
        (" * hessian[0, 1] / hessian[1, 1]", ""),
    ),
)


def pairs() -> list[tuple]:
    """Two weights, the second moment of their inputs, a step; clear of ties, and such that moving wrongly shows."""
    made = [(torch.tensor([0.4, 0.4]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]), 1.0)]
    for seed in range(200):
        w, mixed = normal(seed, 2), normal(seed + 1000, 2, 6)
        mixed[1] = (mixed[1] + mixed[0]) * (0.35 if seed % 2 else 0.6)  # inputs that go together, the first louder
        hessian, scale = mixed @ mixed.t() / 6, 0.2
        error = w[0] - (w[0] / scale).round() * scale
        moves = [error * hessian[0, 1] / hessian[1, 1], error * 0, error * hessian[0, 1] / hessian[0, 0], error]
        ends = torch.stack([w[1] + move for move in (*moves, -moves[0])]) / scale
        points = torch.cat([w[:1] / scale, ends])
        if len(ends.round().unique()) >= 3 and ((points - points.floor() - 0.5).abs() > 0.03).all():
            made.append((w, hessian, scale))
    return made[:24]


ROUND_PAIR = Exercise(
    id="09-round-pair",
    title="Two weights that work together",
    minutes=8,
    difficulty=3,
    task="""
Write `round_pair(w, hessian, scale)`: GPTQ for two weights. `w` has shape (2,), `hessian` is the mean of `x xᵀ` of
their two inputs, shape (2, 2), and `scale` is the step, a number.

- Round the first weight to the nearest multiple of `scale`. Its error is the weight minus what it became.
- Move the second weight to where it makes up for that error best: the squared output error is the smallest if it moves
  by the error times `hessian[0, 1] / hessian[1, 1]`.
- Round it there. Return both rounded values, shape (2,). There is no clamp here.
""",
    function="round_pair",
    stub=PAIR_STUB,
    solution=PAIR,
    hints=(
        "If the first weight lost 0.4 and the inputs always agree, what should the second do to keep the sum?",
        "`error = w[0] - first`, and the second becomes `w[1] + error * …` before it is rounded. What stands at the "
        "dots is 1 if both inputs are the same, and 0 if they have nothing to do with each other.",
        "`second = w[1] + error * hessian[0, 1] / hessian[1, 1]`, then round it like the first, and `torch.stack` "
        "both.",
    ),
    mistakes=PAIR_MISTAKES,
    cases=pairs,
)

COLUMNS_STUB = """\
def round_scaled(w, s):
    raise NotImplementedError("replace this line")
"""

COLUMNS = """\
def round_scaled(w, s):
    larger = w * s
    step = larger.abs().amax(dim=1, keepdim=True) / 7.5
    codes = torch.clamp(torch.round(larger / step), -8, 7)
    return codes * step / s
"""


def _columns(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(COLUMNS, *changes))


COLUMNS_MISTAKES = (
    _columns(
        "not undone",
        "The columns are still larger. The model divides these inputs by `s`, and so must you to compare with `w`.",
        ("codes * step / s", "codes * step"),
    ),
    _columns(
        "codes, not weights",
        "You return the codes. Multiply by the step, and divide the columns by `s`, to come back to weights.",
        ("codes * step / s", "codes"),
    ),
    _columns(
        "not rounded",
        "Your codes are not whole numbers: `larger / step` still has to be rounded.",
        ("torch.round(larger / step)", "larger / step"),
    ),
    _columns(
        "made smaller",
        "A protected column becomes *larger* before rounding, so that a step is small beside it. Multiply first, "
        "divide afterwards.",
        ("w * s", "w / s"),
        ("step / s", "step * s"),
    ),
    _columns(
        "the step of the old weights",
        "The step comes from what is rounded: the largest magnitude of the *scaled* row. With the old one the scaled "
        "weights are clipped.",
        ("larger.abs().amax", "w.abs().amax"),
    ),
    _columns(
        "rows for columns",
        "`s` has an entry for each input, that is for each *column* of the weight. Yours scales the rows, which a "
        "scale per row takes back at once.",
        ("w * s", "w * s[:, None]"),
        ("step / s", "step / s[:, None]"),
    ),
)


def matrices() -> list[tuple]:
    made = []
    for seed in range(4):
        w, s = normal(seed, 6, 6), torch.ones(6)
        s[seed] = 2.0
        s[5] = 1.5
        step = (w * s).abs().amax(dim=1, keepdim=True) / 7.5
        rows = [clear_of_ties(row * s, by.item()) for row, by in zip(w, step, strict=True)]
        made.append((torch.stack(rows) / s, s))
    return made


ROUND_SCALED = Exercise(
    id="09-round-scaled",
    title="Protect a column",
    minutes=6,
    difficulty=2,
    task="""
Write `round_scaled(w, s)`: what AWQ leaves of a weight `w` of shape (rows, columns) when its columns are multiplied by
`s` (columns,) before rounding to INT4.

- Multiply every column by its entry of `s`.
- Quantize with a scale a row: largest magnitude / 7.5, codes from −8 to 7.
- Dequantize, and divide the columns by `s` again, as the model does with the inputs. Return shape (rows, columns).
""",
    function="round_scaled",
    stub=COLUMNS_STUB,
    solution=COLUMNS,
    hints=(
        "Three steps: make larger, round as ever, take the making-larger back.",
        "`w * s` multiplies columns, since the last dimension of `w` meets that of `s`. The step belongs to this "
        "product.",
        "`codes * step / s` at the end.",
    ),
    mistakes=COLUMNS_MISTAKES,
    cases=matrices,
)

EXERCISES = [ROUND_PAIR, ROUND_SCALED]
