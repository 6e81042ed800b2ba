"""Running a method over a model: one pass over the data, each block changed and rounded before the next one runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from canopyq.calibration.calibrate import calibration_blocks
from canopyq.calibration.data import Batch
from canopyq.calibration.statistics import ActivationStats, pooled
from canopyq.errors import CanopyError, prefixed
from canopyq.methods.awq import awq_scales
from canopyq.methods.clip import clip
from canopyq.methods.equivalence import ScalePair, foldable, rescale
from canopyq.methods.gptq import gptq
from canopyq.methods.hqq import hqq
from canopyq.methods.registry import Method
from canopyq.methods.smoothquant import smooth_scales
from canopyq.methods.structure import scale_pairs
from canopyq.methods.transaction import Transaction
from canopyq.nn.fused_linear import fused
from canopyq.nn.targets import Target
from canopyq.tensor.quantized_tensor import QuantizedTensor, UnpackedTensor, global_scale_of, quantize_unpacked, sqnr_db
from canopyq.tensor.scheme import Recipe, Scheme
from canopyq.utils import track

OUTLIERS = 0.01  # of a layer's inputs, the loudest, that ``outliers`` keeps in 16 bits; at least one
TOKEN_NORM_CAP = 2.0  # times as long as the median token: more than that does not count
EXAMPLES = 256  # inputs of each layer that SmoothQuant tries its α on, and that errors are taken from without a Hessian


@dataclass(frozen=True)
class RoundingResult:
    """One weight as a method left it.

    Attributes:
        weight: the codes.
        sqnr_db: of the weight as it was just before rounding.
        output_error: ‖y − ŷ‖ / ‖y‖, from the second moment of the inputs if the method needs it and else from some of
            the inputs; None without data.
        notes: what the method did to this layer, in words.
        outliers: indices (k,) and columns (N, k) of inputs that stay in 16 bits; their codes are zero.
    """

    weight: QuantizedTensor
    sqnr_db: float
    output_error: float | None
    notes: tuple[str, ...]
    outliers: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def round_weights(
    model: nn.Module,
    recipe: Recipe,
    method: Method,
    targets: list[Target],
    batches: list[Batch] | None,
    transaction: Transaction,
) -> dict[str, RoundingResult]:
    """Every target's weight, rounded. The model's own weights become what the codes stand for, block by block, so that
    later blocks are calibrated on what the earlier ones really put out.

    Raises:
        CanopyError: for a method that needs data and has none, an architecture that a transform does not know, and what
            the methods themselves refuse; the message names the layer.
    """
    if method.needs_data and batches is None:
        raise CanopyError(
            f"method {method.name} looks at the inputs of every layer; give calibration=texts or batches of token ids, "
            "e.g. cq.tutor.calibration(tokenizer)"
        )
    pairs: dict[str, list[ScalePair]] = {}
    left: dict[str, str] = {}
    if method.smoothing:
        pairs, left = scale_pairs(model, {"awq": "AWQ", "smoothquant": "SmoothQuant"}[method.smoothing])
    by_name, global_scale = {target.name: target for target in targets}, _GlobalScales(targets)
    results: dict[str, RoundingResult] = {}
    if batches is not None and (method.needs_data or method.transforms):
        watched = [target.name for target in targets if target.kind.multiplies]
        hessian = method.smoothing == "awq" or method.rounding in ("clip", "gptq")
        examples = EXAMPLES if method.smoothing == "smoothquant" or not hessian else 0
        for block, statistics in calibration_blocks(
            model, batches, layers=watched, hessian=hessian, token_norm_cap=TOKEN_NORM_CAP, histograms=False,
            examples=examples,
        ):  # fmt: skip
            notes: dict[str, list[str]] = {name: [] for name in statistics}
            for pair in pairs.get(block, []):
                schemes = {name: by_name[name].scheme for name in pair.consumers if name in statistics}
                _smooth(pair, schemes, recipe, method, statistics, notes, transaction)
            if method.smoothing:
                for name in (name for name in statistics if not notes[name]):
                    unknown = "what makes its inputs, or else reads them, cannot follow"
                    notes[name].append(f"not scaled: {left.get(name) or left.get(block) or unknown}")
            for name, stats in statistics.items():
                result, values = _round(by_name[name], method, stats, notes[name], global_scale(name))
                results[name] = result
                if block and not by_name[name].weight.is_meta:
                    transaction.change(by_name[name].weight, values)
                elif block:
                    note = "its weight lies elsewhere: later blocks were calibrated on what it was before rounding"
                    results[name] = replace(result, notes=(*result.notes, note))
    rest = [target for target in targets if target.name not in results]
    for target in track(rest, f"quantizing to {recipe.name}", len(rest)):
        results[target.name], _ = _round(target, method, None, [], global_scale(target.name))
    return {target.name: results[target.name] for target in targets}


def _smooth(
    pair: ScalePair,
    schemes: dict[str, Scheme],
    recipe: Recipe,
    method: Method,
    statistics: dict[str, ActivationStats],
    notes: dict[str, list[str]],
    transaction: Transaction,
) -> None:
    """Rescale the channels between a pair for the consumers that will be quantized, by ``schemes``; their statistics
    and notes follow."""
    if not schemes:
        return
    weights, inputs = pair.consumers, pooled([statistics[name] for name in schemes])
    if method.smoothing == "awq":
        scales, left = awq_scales(weights, pair.share(inputs.mean_abs), inputs.hessian, schemes)
        note = "AWQ scales help nothing" if left >= 1 else f"AWQ scales: {left:.0%} of the error left"
    else:
        absmax = torch.maximum(-inputs.lo, inputs.hi)
        scales, alpha = smooth_scales(weights, inputs.examples, absmax, schemes, recipe.activations, pair.share)
        note = "smoothing helps nothing" if alpha is None else f"smoothed with α = {alpha:g}"
    scales = foldable(pair, pair.by_producer(scales))
    rescale(pair, scales, transaction)
    for name in schemes:
        statistics[name] = statistics[name].divided(pair.by_consumer(scales).float())
        notes[name].append(note)


class _GlobalScales:
    """The global scale of each weight: one for those that are computed as one, by what they are when the first of them
    is asked for."""

    def __init__(self, targets: list[Target]) -> None:
        with_one = [target for target in targets if target.scheme.format.has_global_scale]
        self.targets = {target.name: target for target in with_one}
        self.together = fused(self.targets)
        self.found: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor | None:
        if name in self.targets and name not in self.found:
            names = self.together[name]
            with prefixed(f"{' or '.join(names)}: "):
                scale = global_scale_of([self.targets[one].read() for one in names], self.targets[name].scheme)
            self.found |= {one: scale.clone() for one in names}  # each layer holds, moves and saves its own
        return self.found.get(name)


def _round(
    target: Target,
    method: Method,
    stats: ActivationStats | None,
    notes: list[str],
    global_scale: Tensor | None,
) -> tuple[RoundingResult, Tensor]:
    """One weight rounded, and the float32 values (N, K) that its codes, and columns kept in 16 bits, stand for."""
    with prefixed(f"{target.name}: "):
        weight = original = target.read()
        hessian, outliers = None if stats is None else stats.hessian, None
        if stats is not None and "outliers" in method.transforms and target.kind.is_linear:
            outliers = _loudest(weight, stats)
            weight, hessian = _without(outliers[0], weight, hessian)
            notes = [*notes, f"{len(outliers[0])} of {weight.shape[1]} inputs kept in 16 bits"]
        rounded, said = _codes(weight, hessian, target.scheme, method.rounding, global_scale)
    notes = [*notes, *said]
    if stats is None and method.needs_data:
        notes.append("no data reached it: rounded to nearest")
    if hessian is not None and stats.tokens < len(hessian):
        notes.append(f"only {stats.tokens} tokens for {len(hessian)} inputs: give more data")
    values = rounded.dequantize(torch.float32)
    sqnr = sqnr_db(weight, values)
    if outliers is not None:
        values[:, outliers[0]] = outliers[1].float()
    error = None if stats is None else _output_error(original, values, stats)
    return RoundingResult(rounded.pack(), sqnr, error, tuple(notes), outliers), values


def _codes(
    weight: Tensor, hessian: Tensor | None, scheme: Scheme, rounding: str, global_scale: Tensor | None
) -> tuple[UnpackedTensor, list[str]]:
    """The codes of a weight (N, K) by a rounding of `registry.ROUNDINGS`, and what to know of them. Without a Hessian
    (K, K), those that need one round to nearest."""
    if rounding == "hqq":
        return hqq(weight, scheme), []
    if rounding == "rtn" or hessian is None:
        return quantize_unpacked(weight, scheme, global_scale), []
    hessian = hessian.to(weight.device)
    if rounding == "clip":
        return clip(weight, hessian, scheme, global_scale), []
    return gptq(weight, hessian, scheme, global_scale=global_scale)


def _loudest(weight: Tensor, stats: ActivationStats) -> tuple[Tensor, Tensor]:
    """Indices (k,) of the inputs with the largest magnitude, and their columns (N, k) in bfloat16."""
    count = max(1, round(OUTLIERS * weight.shape[1]))
    columns = torch.maximum(-stats.lo, stats.hi).topk(count).indices.sort().values.to(weight.device)
    return columns, weight[:, columns].to(torch.bfloat16)


def _without(columns: Tensor, weight: Tensor, hessian: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A weight (N, K) without some columns, and a Hessian (K, K) in which they neither give to others nor take."""
    weight = weight.index_fill(1, columns, 0)
    if hessian is not None:
        loudness = hessian.diagonal().mean()
        hessian = hessian.index_fill(0, columns, 0).index_fill_(1, columns, 0)
        hessian.diagonal()[columns] = loudness
    return weight, hessian


def _output_error(weight: Tensor, rounded: Tensor, stats: ActivationStats) -> float:
    """‖X (W − Ŵ)ᵀ‖ / ‖X Wᵀ‖, both weights (N, K)."""

    def power(rows: Tensor) -> float:
        if stats.hessian is None:
            return float((stats.examples @ rows.t()).square().sum())
        return max(float(((rows @ stats.hessian) * rows).sum()), 0.0)

    signal = power(weight.float())
    return (power(weight.float() - rounded) / signal) ** 0.5 if signal > 0 else 0.0
