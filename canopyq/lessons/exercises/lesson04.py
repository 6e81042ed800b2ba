"""Lesson 04: the integer matmul with a zero point, and the range of a moving average."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered, normal

MATMUL = """\
def int8_matmul(qx, zero_point, x_scale, qw, w_scale):
    sums = qx.int() @ qw.int().T
    sums = sums - zero_point.int() * qw.int().sum(dim=1)
    return sums * x_scale * w_scale.T
"""

_PRODUCT = "qx.int() @ qw.int().T"
_CORRECTION = "    sums = sums - zero_point.int() * qw.int().sum(dim=1)\n"

MATMUL_STUB = altered(  # two faults
    MATMUL, (_PRODUCT, "(qx - zero_point).int() @ qw.int().T"), (_CORRECTION, ""), ("* x_scale *", "* x_scale.max() *")
)


def _matmul(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(MATMUL, *changes))


_FLOATS = (
    "You multiply and add in float32, which holds whole numbers exactly only up to 2^24, 16.8 million. Long sums of "
    "products go "
    "beyond that and lose their last digits. Add up in int32, which holds them all: `.int()`."
)


def _beyond_floats(seed: int, k: int = 20_000) -> tuple:
    """One token of 2 k codes whose products pass 2^24 on the way and nearly cancel: float32 cannot add them up."""
    draw = torch.Generator().manual_seed(seed)
    qx, qw = torch.randint(100, 127, (1, k), generator=draw), torch.randint(90, 128, (2, k), generator=draw)
    more = (torch.rand(1, k, generator=draw) < 0.01).int()
    codes = torch.cat([qx, qx + more], dim=1).to(torch.int8), torch.cat([qw, -qw], dim=1).to(torch.int8)
    return codes[0], torch.tensor([[-100]], dtype=torch.int8), torch.tensor([[0.5]]), codes[1], torch.full((2, 1), 0.01)


def matmul_cases() -> list[tuple]:
    """One token and two outputs first; then random codes, long enough for sums beyond 16 bits, and beyond float32."""
    made: list[tuple] = [
        (
            torch.tensor([[100, -28, 4]], dtype=torch.int8),
            torch.tensor([[-20]], dtype=torch.int8),
            torch.tensor([[0.5]]),
            torch.tensor([[127, 100, -3], [-5, 2, 90]], dtype=torch.int8),
            torch.tensor([[0.01], [0.02]]),
        )
    ]
    for seed, m, n, k in [(0, 2, 3, 5), (1, 3, 4, 40), (2, 5, 2, 300), (3, 4, 6, 17)]:
        draw = torch.Generator().manual_seed(seed)

        def codes(*shape: int, draw: torch.Generator = draw) -> torch.Tensor:
            return torch.randint(-128, 128, shape, generator=draw).to(torch.int8)

        scales = normal(seed + 10, m, 1).abs() + 0.1, (normal(seed + 20, n, 1).abs() + 0.1) / 64
        made.append((codes(m, k), codes(m, 1), scales[0], codes(n, k), scales[1]))
    return [*made, _beyond_floats(5), _beyond_floats(6)]


INT8_MATMUL = Exercise(
    id="04-int8-matmul",
    title="An integer matmul that is nearly right",
    minutes=10,
    difficulty=3,
    task="""
`int8_matmul(qx, zero_point, x_scale, qw, w_scale)` in the cell below should give the output of a W8A8 layer whose
inputs are asymmetric. For symmetric inputs, one token at a time, it is right. For a batch of asymmetric ones it is not.
There are **two faults** in it. Find and mend them.

- `qx` is int8 (tokens, in_features): the codes of the inputs. `zero_point` (int8) and `x_scale` (float) have shape
  (tokens, 1): an input is `(qx - zero_point) * x_scale`.
- `qw` is int8 (out_features, in_features): the codes of the weights, which are symmetric. `w_scale` has shape
  (out_features, 1): a weight is `qw * w_scale`.
- Multiply **integers by integers** and add them up in 32 bits. Zero points and scales come after the sum.
- Return floats of shape (tokens, out_features).
""",
    function="int8_matmul",
    stub=MATMUL_STUB,
    solution=MATMUL,
    hints=(
        "What is 100 − (−128), in eight bits? And whose scale should each token be multiplied by?",
        "Widen before you subtract, or subtract after the sum: (q − z) · w, added up, is the product of the codes "
        "minus the "
        "zero point times the sum of a weight row.",
        "`qx.int() @ qw.int().T - zero_point.int() * qw.int().sum(dim=1)`, then `* x_scale * w_scale.T`.",
    ),
    mistakes=(
        _matmul(
            "sums in 16 bits",
            "Your sums wrap around: a product of two codes takes up to 15 bits, so 16 hold two of them. Add up in 32: "
            "`.int()`.",
            (_PRODUCT, "(qx.short() @ qw.short().T).int()"),
        ),
        _matmul(
            "sums in 8 bits",
            "You multiply int8 tensors as they are, and PyTorch adds int8 up in int8: everything wraps around. Widen "
            "both first: `.int()`.",
            (_PRODUCT, "(qx @ qw.T).int()"),
        ),
        _matmul("sums in float32", _FLOATS, (_PRODUCT, "qx.float() @ qw.float().T")),
        _matmul("sums in float32", _FLOATS, (_PRODUCT, "(qx.float() - zero_point) @ qw.float().T"), (_CORRECTION, "")),
        _matmul(
            "sums in float32",
            _FLOATS,
            (_PRODUCT, "((qx.float() - zero_point) * x_scale) @ (qw * w_scale).T"),
            (_CORRECTION, ""),
            ("sums * x_scale * w_scale.T", "sums"),
        ),
        _matmul(
            "zero point forgotten",
            "You multiply the codes as if the inputs were symmetric. Code `zero_point` stands for 0, not code 0: the "
            "zero point times the sum of each weight row has to go.",
            (_CORRECTION, ""),
        ),
        _matmul(
            "zero point added",
            "The correction has the wrong sign. (q − z) · w = q · w − z · w: it is subtracted.",
            ("sums = sums - zero_point", "sums = sums + zero_point"),
        ),
        _matmul(
            "zero point subtracted in 8 bits",
            "You subtract the zero point from the codes before you widen them. The difference reaches from −255 to 255 "
            "and wraps around in int8. Widen first, or correct after the sum.",
            (_PRODUCT, "(qx - zero_point).int() @ qw.int().T"),
            (_CORRECTION, ""),
        ),
        _matmul(
            "zero point without the weights",
            "You subtract the bare zero point. It was added to *every* input, and each was multiplied by its weight: "
            "the correction is the zero point times the sum of the weight row.",
            (" * qw.int().sum(dim=1)", ""),
        ),
        _matmul(
            "zero point times the number of inputs",
            "You subtract the zero point once for each input. Each of them was multiplied by a weight: take the sum of "
            "the weight row instead of its length.",
            ("qw.int().sum(dim=1)", "qw.shape[1]"),
        ),
        _matmul(
            "sum of the inputs",
            "Your correction adds up the codes of the *inputs*. It is the weights that the zero point was multiplied "
            "by: `qw.int().sum(dim=1)`.",
            ("qw.int().sum(dim=1)", "qx.int().sum(dim=1, keepdim=True)"),
        ),
        _matmul(
            "one correction for all outputs",
            "You add up all weights of the layer. Each output has its own row: `sum(dim=1)`.",
            ("sum(dim=1)", "sum()"),
        ),
        _matmul(
            "sum of the weights in 8 bits",
            "PyTorch adds small integers up in 64 bits, unless told otherwise. You told it to stay in 8: the sums of "
            "the weight rows wrap around.",
            ("qw.int().sum(dim=1)", "qw.sum(dim=1, dtype=torch.int8).int()"),
        ),
        _matmul(
            "correction after the scales",
            "You correct after the scales. The zero point is a number of steps: subtract it while the sums are still "
            "integers.",
            (
                _CORRECTION + "    return sums * x_scale * w_scale.T",
                "    return sums * x_scale * w_scale.T - zero_point.int() * qw.int().sum(dim=1)",
            ),
        ),
        _matmul(
            "scale of the weights forgotten",
            "Your result lacks the scales of the weights: one for each output.",
            (" * w_scale.T", ""),
        ),
        _matmul(
            "scale of the inputs forgotten",
            "Your result lacks the scales of the inputs: one for each token.",
            (" * x_scale", ""),
        ),
        _matmul(
            "divided by the scales",
            "You divide by the scales. Dividing made the codes; coming back is multiplying.",
            ("sums * x_scale * w_scale.T", "sums / x_scale / w_scale.T"),
        ),
        _matmul(
            "one scale for all tokens",
            "You use one input scale for all tokens. Each token has its own: keep the shape (tokens, 1).",
            ("* x_scale *", "* x_scale.max() *"),
        ),
    ),
    cases=matmul_cases,
    parts=("y",),
)

RANGE = """\
def moving_range(samples, momentum):
    lo, hi = samples[0].min(), samples[0].max()
    for sample in samples[1:]:
        lo = momentum * lo + (1 - momentum) * sample.min()
        hi = momentum * hi + (1 - momentum) * sample.max()
    return lo, hi
"""

RANGE_STUB = altered(  # two faults
    RANGE,
    ("samples[0].min(), samples[0].max()", "torch.zeros(2)"),
    ("samples[1:]", "samples"),
    ("lo = momentum * lo + (1 - momentum) * sample.min()", "lo = (1 - momentum) * lo + momentum * sample.min()"),
    ("hi = momentum * hi + (1 - momentum) * sample.max()", "hi = (1 - momentum) * hi + momentum * sample.max()"),
)


def _range(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(RANGE, *changes))


_START = "    lo, hi = samples[0].min(), samples[0].max()\n"
_LOOP = RANGE[RANGE.index("    for") : RANGE.index("    return")]


def range_cases() -> list[tuple]:
    """Three short samples of which one spikes; then random ones of different sizes."""
    readable = torch.tensor([[-1.0, 0.5, 2.0], [-2.0, 1.0, 1.5], [-1.0, 0.0, 12.0]])
    made: list[tuple] = [(readable, 0.9)]
    for seed, n, k, momentum in [(0, 5, 8, 0.9), (1, 12, 20, 0.5), (2, 4, 3, 0.99), (3, 7, 16, 0.75)]:
        made.append((normal(seed, n, k) * 2.0 ** normal(seed + 10, n, 1) + 0.2, momentum))
    return made


MOVING_RANGE = Exercise(
    id="04-moving-range",
    title="An observer that forgets too much",
    minutes=6,
    difficulty=2,
    task="""
`moving_range(samples, momentum)` in the cell below should give the range that the moving-average observer finds. With a
momentum of 0.9 its range is nearly that of the last sample, whatever came before; and after a single sample it is
narrower than that sample. There are **two faults** in it, one for each. Find and mend them. What it should do:

- `samples` has shape (samples, values): what went into one layer, one row a sample, in the order of the data.
- It starts with the smallest and the largest value of the first sample.
- Then, for each next sample, both ends move: `momentum` of where they were, `1 - momentum` of the sample's own end.
- Return the two ends, `lo` and `hi`.
""",
    function="moving_range",
    stub=RANGE_STUB,
    solution=RANGE,
    hints=(
        "Two numbers are all that it remembers. What are they after the first sample, and how much of them is kept?",
        "Start with `samples[0].min()` and `samples[0].max()`, then loop over `samples[1:]`. `momentum` is what is "
        "*kept*.",
        "In the loop: `lo = momentum * lo + (1 - momentum) * sample.min()`, and the same for `hi` with `max()`.",
    ),
    mistakes=(
        _range(
            "starts at zero",
            "Your ends start at 0, so the first samples are averaged with nothing and the range comes out too narrow. "
            "Start with the first sample's own ends.",
            (_START, "    lo = hi = torch.tensor(0.0)\n"),
            ("samples[1:]", "samples"),
        ),
        _range(
            "momentum on the wrong side",
            "You give `momentum` to the new sample. It is what is *kept*: with 0.9 a new sample counts a tenth.",
            ("momentum * lo + (1 - momentum) * sample.min()", "(1 - momentum) * lo + momentum * sample.min()"),
            ("momentum * hi + (1 - momentum) * sample.max()", "(1 - momentum) * hi + momentum * sample.max()"),
        ),
        _range(
            "min-max",
            "That is the smallest and the largest value of all samples: the min-max observer, which never forgets.",
            (_LOOP, "    lo, hi = samples.min(), samples.max()\n"),
        ),
        _range(
            "plain mean",
            "You take the plain mean of the samples' ends. In a moving average each step forgets a little: the latest "
            "samples count most.",
            (_LOOP, "    lo, hi = samples.amin(dim=1).mean(), samples.amax(dim=1).mean()\n"),
        ),
        _range(
            "average of the values",
            "You average the values and take the ends afterwards, but values of different samples cancel out. Take the "
            "ends of each sample first, then average those.",
            (_START, "    mean = samples[0]\n"),
            (_LOOP, "    for sample in samples[1:]:\n        mean = momentum * mean + (1 - momentum) * sample\n"),
            ("return lo, hi", "return mean.min(), mean.max()"),
        ),
        _range(
            "the last sample only",
            "Your range is that of the last sample. Keep `momentum` of where the ends were.",
            ("momentum * lo + (1 - momentum) * ", ""),
            ("momentum * hi + (1 - momentum) * ", ""),
        ),
        _range(
            "symmetric range",
            "You return minus and plus the larger end. The observer keeps both ends; making them symmetric is for the "
            "scale to decide.",
            ("return lo, hi", "end = torch.maximum(-lo, hi)\n    return -end, end"),
        ),
        _range(
            "average of the sizes",
            "You average the largest *magnitudes*, for both ends. Take `min()` for one end and `max()` for the other.",
            ("samples[0].min(), samples[0].max()", "-samples[0].abs().max(), samples[0].abs().max()"),
            ("sample.min()", "-sample.abs().max()"),
            ("sample.max()", "sample.abs().max()"),
        ),
        _range(
            "along the values",
            "Your loop runs over the values instead of the samples. A sample is a row: loop over `samples` itself.",
            ("samples[0].min(), samples[0].max()", "samples[:, 0].min(), samples[:, 0].max()"),
            ("samples[1:]", "samples.T[1:]"),
        ),
        _range(
            "only outwards",
            "Your range can only grow: you take the wider of the old end and the average. A moving average comes back "
            "after a spike.",
            ("lo = momentum * lo + (1 - momentum) * sample.min()",
             "lo = torch.minimum(lo, momentum * lo + (1 - momentum) * sample.min())"),
            ("hi = momentum * hi + (1 - momentum) * sample.max()",
             "hi = torch.maximum(hi, momentum * hi + (1 - momentum) * sample.max())"),
        ),
    ),
    cases=range_cases,
    parts=("lo", "hi"),
)  # fmt: skip

EXERCISES = [INT8_MATMUL, MOVING_RANGE]
