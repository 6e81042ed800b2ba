"""Lesson 08: moving outliers into the weights, and where to cut a range."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered, normal

SMOOTH = """\
def smooth_scales(x, w, alpha):
    loud = x.abs().amax(dim=0)
    heavy = w.abs().amax(dim=0)
    return loud**alpha / heavy ** (1 - alpha)
"""

SMOOTH_STUB = altered(  # two faults
    SMOOTH,
    ("loud**alpha / heavy ** (1 - alpha)", "loud ** (1 - alpha) / heavy**alpha"),
    ("x.abs().amax(dim=0)", "x.amax(dim=0)"),
)


_RESULT = "loud**alpha / heavy ** (1 - alpha)"


def _smooth(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(SMOOTH, *changes))


def _smooth_cases() -> list[tuple]:
    """Two features first, of which the second is loud; then square ones, with outliers below zero as well as above."""
    made: list[tuple] = [(torch.tensor([[1.0, -9.0], [-4.0, 16.0]]), torch.tensor([[0.25, -0.5], [1.0, 0.125]]), 0.5)]
    for seed, size, alpha in [(1, 3, 0.75), (2, 5, 0.25), (3, 6, 0.6), (4, 8, 0.85)]:
        loud = torch.ones(size)
        loud[seed % size] = -40.0
        made.append((normal(seed, size, size) * loud - 0.3, 0.1 * normal(seed + 10, size, size) - 0.03, alpha))
    return made


SMOOTH_SCALES = Exercise(
    id="08-smooth-scales",
    title="The burden is not shared",
    minutes=8,
    difficulty=2,
    task="""
`smooth_scales(x, w, alpha)` in the cell below should give SmoothQuant's scale for each input feature of a layer. At an
`alpha` of one half it works on most layers. Where the outliers lie below zero it does not, and with a larger `alpha`,
which should move more of them, they stay where they are. There are **two faults** in it. Find and mend them. What it
should do:

- `x` are inputs, (tokens, features), and `w` is the weight, (outputs, features).
- A feature's scale is the largest magnitude that its inputs have, to the power of `alpha`, divided by the largest
  magnitude of its weights, to the power of `1 - alpha`.
- Return shape (features,). Inputs will be *divided* by it and the columns of `w` multiplied.
""",
    function="smooth_scales",
    stub=SMOOTH_STUB,
    solution=SMOOTH,
    hints=(
        "What does the function say of a feature whose inputs are −9 and −4? And what happens to the scale of a loud "
        "one when "
        "`alpha` grows?",
        "An outlier may be negative. And with `alpha` at 1 the inputs alone should decide.",
        "`x.abs().amax(dim=0)`, and `loud**alpha / heavy ** (1 - alpha)`.",
    ),
    mistakes=(
        _smooth(
            "exponents swapped",
            "The inputs got `1 - alpha` and the weights `alpha`. A larger alpha should move *more* of the inputs' "
            "range: "
            "it belongs to the inputs.",
            (_RESULT, "loud ** (1 - alpha) / heavy**alpha"),
        ),
        _smooth(
            "scale upside down",
            "Your scales are one over the right ones. Inputs are divided by them, so a loud feature needs a *large* "
            "one.",
            (_RESULT, "heavy ** (1 - alpha) / loud**alpha"),
        ),
        _smooth(
            "the same exponent for both",
            "You raised both to `alpha`. The exponents add up to one: `1 - alpha` for the weights.",
            (_RESULT, "(loud / heavy) ** alpha"),
        ),
        _smooth(
            "multiplied by the weights",
            "You multiply by the weights' magnitude. A column with large weights has little room, so it should get a "
            "*smaller* scale: divide.",
            (_RESULT, "loud**alpha * heavy ** (1 - alpha)"),
        ),
        _smooth(
            "weights forgotten",
            "Your scales know the inputs only. Then all the outliers move into the weights; divide by the weights' "
            "magnitude to the power of `1 - alpha`.",
            (_RESULT, "loud**alpha"),
        ),
        _smooth(
            "alpha always a half",
            "You took the square root whatever `alpha` is.",
            (_RESULT, "(loud / heavy).sqrt()"),
        ),
        _smooth(
            "largest input, not largest magnitude",
            "You took the largest input. An outlier may be negative: `abs()` first.",
            ("x.abs().amax(dim=0)", "x.amax(dim=0)"),
        ),
        _smooth(
            "rows of the weight, not its columns",
            "You took the largest weight of each *output*. The scale belongs to a feature, which is a column of `w`: "
            "`dim=0`.",
            ("w.abs().amax(dim=0)", "w.abs().amax(dim=1)"),
        ),
        _smooth(
            "tokens, not features",
            "You took the largest input of each *token*. The scale belongs to a feature, over all tokens: `dim=0`.",
            ("x.abs().amax(dim=0)", "x.abs().amax(dim=1)"),
        ),
        _smooth(
            "average instead of largest",
            "You took the mean magnitude of the inputs. The range has to hold the largest: `amax`.",
            ("x.abs().amax(dim=0)", "x.abs().mean(dim=0)"),
        ),
        _smooth(
            "average weight instead of largest",
            "You took the mean magnitude of the weights. Their range has to hold the largest, too: `amax`.",
            ("w.abs().amax(dim=0)", "w.abs().mean(dim=0)"),
        ),
        _smooth(
            "averages instead of largest",
            "You took mean magnitudes, of inputs and of weights. Both ranges have to hold the largest: `amax`.",
            ("x.abs().amax(dim=0)", "x.abs().mean(dim=0)"),
            ("w.abs().amax(dim=0)", "w.abs().mean(dim=0)"),
        ),
        _smooth(
            "largest weight, not largest magnitude",
            "You took the largest weight. A large weight below zero counts as much: `abs()` first.",
            ("w.abs().amax(dim=0)", "w.amax(dim=0)"),
        ),
        _smooth(
            "largest values, not largest magnitudes",
            "You took the largest input and the largest weight. Large values below zero count as much: `abs()` first.",
            ("x.abs().amax(dim=0)", "x.amax(dim=0)"),
            ("w.abs().amax(dim=0)", "w.amax(dim=0)"),
        ),
    ),
    cases=_smooth_cases,
    parts=("scales",),
)

END_STUB = """\
def best_end(x, ends, bits):
    raise NotImplementedError("replace this line")
"""

END = """\
def best_end(x, ends, bits):
    errors = []
    for end in ends:
        scale = end / ((2**bits - 1) / 2)
        codes = torch.clamp(torch.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors.append(((codes * scale - x) ** 2).mean())
    return ends[torch.stack(errors).argmin()]
"""

_CLAMPED = "torch.clamp(torch.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)"
_ERROR = "((codes * scale - x) ** 2).mean()"
_BEST = "ends[torch.stack(errors).argmin()]"


_INSIDE = (
    "You clamp, and then count only the values that lie inside. What the others lose by the clamp is the price of a "
    "narrow "
    "range: without it the narrowest looks best. Take the mean over all of `x`."
)


def _end(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(END, *changes))


def _end_cases() -> list[tuple]:
    """Values with long tails, so that the least error lies well inside; then values near whole numbers, where the best
    end without a clamp is not the narrowest."""
    made = []
    for seed, bits, tail in [(0, 4, 3.0), (1, 3, 2.0), (2, 2, 1.5), (3, 4, 6.0), (4, 3, 4.0)]:
        x = normal(seed, 400)
        x = x * (1 + tail * (normal(seed + 20, 400).abs() > 2))
        largest = float(x.abs().max())
        made.append((x, torch.tensor([largest * share / 8 for share in range(1, 9)]), bits))
    for seed, bits, narrow in [(13, 2, 0.35), (14, 3, 0.66), (15, 3, 0.66)]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-1, 2, (60,), generator=generator) * (1 + 0.04 * torch.randn(60, generator=generator))
        ends = [narrow, *((2**bits - 1) / 2 * share for share in (1.0, 1.7, 2.6)), 13.0]
        made.append((torch.cat([x, torch.tensor([12.0, -11.0])]), torch.tensor(ends), bits))
    return made


BEST_END = Exercise(
    id="08-best-end",
    title="Fit the giraffe",
    minutes=10,
    difficulty=3,
    task="""
Write `best_end(x, ends, bits)`: of several places where a symmetric range may end, the one with the least mean squared
error.

- `ends` is a tensor of candidates; return the best of them, as it stands there.
- The scale is `end / ((2**bits - 1) / 2)`. Round, clamp to the codes from `-(2**(bits-1))` to `2**(bits-1) - 1`, and
  come back.
- All values of `x` count: those that are clamped, and those that are only rounded.
""",
    function="best_end",
    stub=END_STUB,
    solution=END,
    hints=(
        "Write what one `end` does to `x` first. Then do it for all of them and compare.",
        "For one end: `codes * scale` is what comes back, and its mean squared error is one number. Collect these "
        "numbers.",
        "`torch.stack(errors).argmin()` is the *place* of the smallest error; `ends[…]` is the end there.",
    ),
    mistakes=(
        _end(
            "no clamp",
            "You do not clamp, so nothing is ever cut off and the narrowest range always looks best. Real codes end at "
            "`2**(bits-1) - 1`.",
            (_CLAMPED, "torch.round(x / scale)"),
        ),
        _end("those that are clamped left out", _INSIDE, (_ERROR, "((codes * scale - x)[x.abs() <= end] ** 2).mean()")),
        _end("those that are clamped left out", _INSIDE, (_ERROR, "((codes * scale - x)[x.abs() <= end] ** 2).sum()")),
        _end(
            "the whole range",
            "You return the widest range. Nothing is clipped there, but all values are rounded coarsely. Compare the "
            "errors.",
            (_BEST, "ends.max()"),
        ),
        _end(
            "absolute error",
            "You compare mean *absolute* errors. Squaring makes one large error count for more than many small ones; "
            "the "
            "task asks for squares.",
            (_ERROR, "(codes * scale - x).abs().mean()"),
        ),
        _end(
            "largest error only",
            "You compare the single largest error. Then a few outliers decide alone; take the mean of all squares.",
            (_ERROR, "(codes * scale - x).abs().max()"),
        ),
        _end(
            "the place, not the end",
            "You return the number of the best candidate. Return the candidate itself: `ends[that number]`.",
            (_BEST, "torch.stack(errors).argmin()"),
        ),
        _end(
            "the error, not the end",
            "You return the least error. The task asks where it was reached: the end.",
            (_BEST, "torch.stack(errors).min()"),
        ),
        _end(
            "the worst of all",
            "You return the end with the *largest* error: `argmin`, not `argmax`.",
            ("argmin()", "argmax()"),
        ),
        _end(
            "scale upside down",
            "Your scale is one over the right one, so hardly anything fits. It is the width of a step: end over half "
            "the "
            "steps.",
            ("end / ((2**bits - 1) / 2)", "((2**bits - 1) / 2) / end"),
        ),
    ),
    cases=_end_cases,
    parts=("end",),
)

EXERCISES = [SMOOTH_SCALES, BEST_END]
