"""One fixed range for all inputs of a layer, from what calibration saw of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from canopyq.calibration.statistics import ActivationStats
from canopyq.errors import CanopyError
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.observers import find_range
from canopyq.tensor.scheme import Scheme

MOMENTUM = 0.9  # what a moving average keeps of its past at each sample
SEARCH = {"smallest": 0.01, "candidates": 64}  # inputs spike more than weights: look further inside their range
OPTIONS = {"percentile": {"keep": 0.9999}, "mse": SEARCH, "entropy": SEARCH}
LOUD = 30.0  # times the range of the other 99.99 %: what lies so far out is few values that decide much
MERGED = {"mse": 4, "entropy": 8}  # bins taken as one: a search needs fewer, TensorRT's divergence some 2,000


def static_range(seen: ActivationStats, scheme: Scheme, **options: Any) -> tuple[float, float]:
    """The ends of the range that the scheme's observer chooses. A symmetric scheme then reaches as far as the farther
    end, on either side.

    * ``minmax``      the smallest and the largest value that occurred
    * ``average``     the moving average of the samples' ranges (Jacob et al. 2018, section 3.1): ``momentum`` = 0.9 of
      the past and a tenth of each next sample
    * ``percentile``  the range that holds ``keep`` = 99.99 % of all values: with one scale for all tokens a few large
      values are dear, and more than a few are needed (Wu et al. 2020, "Integer Quantization for Deep Learning
      Inference", section 4.2, compares 99.9 to 99.9999 %). Where that would cut off a value 30 times as far out,
      ``mse`` decides instead: many models have a few massive activations that stand for much (Sun et al. 2024,
      "Massive Activations in Large Language Models"), and clipping them ruins the model. A ``keep`` of your own counts
    * ``mse``, ``entropy``  on the histogram of all values; see `observers`

    Args:
        seen: of the layer's inputs.
        scheme: of the inputs.
        options: for the observer, such as ``keep=0.9999``.

    Raises:
        CanopyError: if the observer cannot work with the format.
    """
    ends = _range(seen, scheme, **options)
    if scheme.observer == "percentile" and not options and _reach(seen) > LOUD * max(map(abs, ends)):
        return _range(seen, replace(scheme, observer="mse"))
    return ends


def is_loud(seen: ActivationStats, scheme: Scheme) -> bool:
    """Whether one range for all inputs does harm whatever it is: it cuts off values `LOUD` times as large as the other
    99.99 %, or it takes them in and leaves those hardly a code. Floats have a step that grows, and need not mind."""
    if not isinstance(scheme.format, IntFormat):
        return False
    return _reach(seen) > LOUD * max(map(abs, _range(seen, replace(scheme, observer="percentile"))))


def _reach(seen: ActivationStats) -> float:
    """The largest magnitude that occurred."""
    return float(seen.ranges.abs().max())


def _range(seen: ActivationStats, scheme: Scheme, **options: Any) -> tuple[float, float]:
    """What the observer itself chooses."""
    lo, hi = float(seen.ranges[:, 0].min()), float(seen.ranges[:, 1].max())
    if options and scheme.observer == "minmax":
        raise CanopyError(f"min-max ranges have nothing to choose; leave {', '.join(options)} out")
    if scheme.observer == "average":
        return _average(seen.ranges, **options)
    if scheme.observer == "minmax":
        return lo, hi
    merged = MERGED.get(scheme.observer, 1)
    counts = seen.histogram.counts.view(-1, merged).sum(1)
    occurred = counts.nonzero().flatten()
    values = seen.histogram.values().view(-1, merged).mean(1)[occurred].clamp(lo, hi)
    values[0], values[-1] = lo, hi  # the ends are known exactly, the rest to half a bin
    options = OPTIONS[scheme.observer] | options
    ends = find_range(values[None], scheme, counts=counts[occurred][None], **options)
    return float(ends[0]), float(ends[1])


def static_scale(seen: ActivationStats, scheme: Scheme, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Scale (1,) in the scheme's ``scale_dtype`` and zero point (1,) int8, None if symmetric, of that range; of NVFP4
    the global scale (1,) float32."""
    lo, hi = static_range(seen, scheme, **options)
    if scheme.format.has_global_scale:
        return scheme.format.global_scale(torch.tensor(max(-lo, hi))), None
    return scheme.scale_and_zero_point(torch.tensor([lo]), torch.tensor([hi]))


def _average(ranges: Tensor, momentum: float = MOMENTUM) -> tuple[float, float]:
    ends = ranges[0]
    for sample in ranges[1:]:
        ends = momentum * ends + (1 - momentum) * sample
    return float(ends[0]), float(ends[1])
