"""Running a method over a model: one pass over the data, each block changed and rounded before the next one runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from canopyq.batches import Batch
from canopyq.calibration import calibrate
from canopyq.errors import CanopyError
from canopyq.inputs import InputStatistics
from canopyq.methods.awq import awq_scales
from canopyq.methods.clip import clip
from canopyq.methods.gptq import gptq
from canopyq.methods.hqq import hqq
from canopyq.methods.method import Method
from canopyq.methods.smoothquant import smooth_scales
from canopyq.methods.structure import Site, foldable, require_known, rescale, sites
from canopyq.methods.undo import Undo
from canopyq.report import sqnr_db
from canopyq.scheme import Recipe, Scheme
from canopyq.targets import Target
from canopyq.tensor import QuantizedTensor, quantize
from canopyq.utils import track

OUTLIERS = 0.01  # of a layer's inputs, the loudest, that ``outliers`` keeps in 16 bits; at least one
CAP = 2.0  # times as long as the median token: more than that does not count
EXAMPLES = 256  # inputs of each layer that SmoothQuant tries its α on, and that errors are taken from without a Hessian


@dataclass(frozen=True)
class Rounded:
    """One weight as a method left it.

    Attributes:
        weight: the codes.
        sqnr_db: of the weight as it was just before rounding.
        output_error: ‖y − ŷ‖ / ‖y‖, from the second moment of the inputs if the method needs it and else from some of
            the inputs; None without data.
        notes: what the method did to this layer, in words.
        kept: indices (k,) and columns (N, k) of inputs that stay in 16 bits; their codes are zero.
    """

    weight: QuantizedTensor
    sqnr_db: float
    output_error: float | None
    notes: tuple[str, ...]
    kept: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def round_weights(
    model: nn.Module, recipe: Recipe, method: Method, targets: list[Target], batches: list[Batch] | None, undo: Undo
) -> dict[str, Rounded]:
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
    work = _Work(model, recipe, method, {target.name: target for target in targets}, undo)
    if method.smoothing:
        require_known(model, {"awq": "AWQ", "smoothquant": "SmoothQuant"}[method.smoothing])
    if batches is not None and (method.needs_data or method.transforms):
        watched = [target.name for target in targets if target.kind != "embedding"]
        hessian = method.smoothing == "awq" or method.rounding in ("clip", "gptq")
        examples = EXAMPLES if method.smoothing == "smoothquant" or not hessian else 0
        calibrate(
            model, batches, layers=watched, hessian=hessian, cap=CAP, histograms=False, examples=examples,
            visit=work.visit,
        )  # fmt: skip
    rest = [target for target in targets if target.name not in work.done]
    for target in track(rest, f"quantizing to {recipe.name}", len(rest)):
        work.round(target, None)
    return {target.name: work.done[target.name] for target in targets}


class _Work:
    """What is done so far."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, method: Method, targets: dict[str, Target], undo: Undo
    ) -> None:
        self.model, self.recipe, self.method, self.targets, self.undo = model, recipe, method, targets, undo
        self.done: dict[str, Rounded] = {}
        self.notes: dict[str, list[str]] = {}

    def visit(self, block: str, seen: dict[str, InputStatistics]) -> None:
        """Change and round the layers of one block."""
        seen = dict(seen)
        if self.method.smoothing and block:
            for site in sites(self.model, block):
                self._smooth(site, seen)
        for name, statistics in seen.items():
            self.round(self.targets[name], statistics, write=bool(block))

    def _smooth(self, site: Site, seen: dict[str, InputStatistics]) -> None:
        schemes = {name: self.targets[name].scheme for name in site.readers if name in seen}
        if not schemes:
            return
        weights = {name: reader.weight for name, reader in site.readers.items()}
        inputs = seen[next(iter(schemes))]
        if self.method.smoothing == "awq":
            scales, left = awq_scales(weights, site.share(inputs.mean_abs), inputs.hessian, schemes)
            note = "AWQ scales help nothing" if left >= 1 else f"AWQ scales: {left:.0%} of the error left"
        else:
            absmax, activations = torch.maximum(-inputs.lo, inputs.hi), self.recipe.activations
            scales, alpha = smooth_scales(weights, inputs.examples, absmax, schemes, activations, site.share)
            note = "smoothing helps nothing" if alpha is None else f"smoothed with α = {alpha:g}"
        made = foldable(site, site.by_maker(scales))
        rescale(site, made, self.undo)
        for name in schemes:
            seen[name] = seen[name].divided(site.by_reader(made).float())
            self.notes.setdefault(name, []).append(note)

    def round(self, target: Target, inputs: InputStatistics | None, *, write: bool = False) -> None:
        """Round one weight, and with ``write`` give the model what its codes stand for."""
        hessian = None if inputs is None else inputs.hessian
        notes = self.notes.setdefault(target.name, [])
        try:
            before = target.read()
        except CanopyError as error:
            raise CanopyError(f"{target.name}: {error}") from None
        original, kept = before, None
        if inputs is not None and "outliers" in self.method.transforms and target.kind != "expert":
            kept = _loudest(original, inputs)
            original = original.index_fill(1, kept[0], 0)
            if hessian is not None:
                loudness = hessian.diagonal().mean()
                hessian = hessian.index_fill(0, kept[0], 0).index_fill_(1, kept[0], 0)
                hessian.diagonal()[kept[0]] = loudness  # alone, so that these columns neither give nor take
        try:
            weight, said = _round(original, hessian, target.scheme, self.method.rounding)
        except CanopyError as error:
            raise CanopyError(f"{target.name}: {error}") from None
        if inputs is None and self.method.needs_data:
            said = [*said, "no data reached it: rounded to nearest"]
        if hessian is not None and inputs.tokens < len(hessian):
            said = [*said, f"only {inputs.tokens} tokens for {len(hessian)} inputs: give more data"]
        if write and target.weight.is_meta:
            said = [*said, "its weight lies elsewhere: later blocks were calibrated on what it was before rounding"]
        if kept is not None:
            said = [f"{len(kept[0])} of {original.shape[1]} inputs kept in 16 bits", *said]
        values = weight.dequantize(torch.float32)
        if kept is not None:
            values[:, kept[0]] = kept[1].float()
        error = None if inputs is None else _output_error(before, values, inputs)
        self.done[target.name] = Rounded(weight, sqnr_db(original, weight), error, (*notes, *said), kept)
        if write and not target.weight.is_meta:
            self.undo.change(target.weight, values)


def _round(weight: Tensor, hessian: Tensor | None, scheme: Scheme, rounding: str) -> tuple[QuantizedTensor, list[str]]:
    if rounding == "hqq":
        return hqq(weight, scheme), []
    if rounding == "rtn" or hessian is None:
        return quantize(weight, scheme), []
    hessian = hessian.to(weight.device)
    return gptq(weight, hessian, scheme) if rounding == "gptq" else (clip(weight, hessian, scheme), [])


def _loudest(weight: Tensor, inputs: InputStatistics) -> tuple[Tensor, Tensor]:
    """The inputs with the largest magnitude, and their columns as they are kept."""
    count = max(1, round(OUTLIERS * weight.shape[1]))
    columns = torch.maximum(-inputs.lo, inputs.hi).topk(count).indices.sort().values.to(weight.device)
    return columns, weight[:, columns].to(torch.bfloat16)


def _output_error(weight: Tensor, rounded: Tensor, inputs: InputStatistics) -> float:
    def power(rows: Tensor) -> float:
        if inputs.hessian is None:
            return float((inputs.examples @ rows.t()).square().sum())
        return max(float(((rows @ inputs.hessian) * rows).sum()), 0.0)

    signal = power(weight.float())
    return (power(weight.float() - rounded) / signal) ** 0.5 if signal > 0 else 0.0
