"""Which weights of a model a recipe quantizes, and why every other one is kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from canopyq.errors import CanopyError, did_you_mean, shown
from canopyq.nn.linear import quantized_layers
from canopyq.nn.sites import Holder, Site, beside_language_model, output_heads, weight_holders
from canopyq.tensor.quantized_tensor import check_fit
from canopyq.tensor.scheme import Recipe, Scheme, is_part


@dataclass(frozen=True, eq=False)
class Target(Site):
    """One weight that will be quantized.

    Attributes:
        scheme: how.
    """

    scheme: Scheme


FEW = 0.8  # of the linear parameters: whoever quantizes less has to know


def few(share: float, before: str = "") -> str:
    """Words for a share of the linear parameters that is so small that the first line has to say it; "" for others."""
    return f"{before} only {100 * share:.2g} % of the linear parameters" if share < FEW else ""


def find_targets(
    model: nn.Module, recipe: Recipe, *, strict: bool = False
) -> tuple[list[Target], dict[str, str], float]:
    """What to quantize, in the model's order; for every other module that holds a weight, why it is kept; and the share
    of the linear parameters that is quantized. Embeddings do not count for it, what the recipe keeps, and what lies
    beside a language model.

    Args:
        strict: refuse a matrix that would be kept though the recipe does not say so.

    Raises:
        CanopyError: if the model is quantized already, here or by transformers, has lazy weights, or nothing to
            quantize; for an entry of the recipe's ignore list that fits no module, an exception that counts for no
            weight or does not fit it, and what ``strict`` refuses.
    """
    targets: list[Target] = []
    kept: dict[str, str] = {}
    left: dict[str, int] = {}  # matrices that the recipe does not keep, and their sizes
    holders, heads, beside = weight_holders(model), output_heads(model), beside_language_model(model)
    _check_ignored(model, recipe, holders)
    if already := next(quantized_layers(model), None):
        raise CanopyError(f"{already[0] or 'the model'} is quantized already; start from a freshly loaded model")
    if (held := getattr(getattr(model, "config", None), "quantization_config", None)) is not None:
        method = held.get("quant_method") if isinstance(held, dict) else getattr(held, "quant_method", None)
        raise CanopyError(
            f"transformers holds the model quantized ({getattr(method, 'value', method)}); load it with "
            "dequantize=True in its quantization_config, or start from the original"
        )
    for holder in holders:
        label = holder.name or "the model"
        if wish := _wish(holder, recipe, heads, beside):
            kept[label] = wish
        elif reason := holder.reason or _misfit(holder, recipe):
            kept[label] = reason
            matrices = [weight for weight in holder.tensors.values() if weight.dim() > 1]
            if strict and matrices:
                raise CanopyError(f"strict: {label} would be kept as it is, {reason}")
            if matrices:
                left[label] = sum(weight.numel() for weight in matrices)
        elif not holder.name:
            raise CanopyError(
                f"a bare {type(model).__name__} has no place to be replaced in; use QuantizedLinear.from_linear"
            )
        else:
            targets += [Target(**vars(site), scheme=recipe.scheme_of(*site.names)) for site in holder.sites]
    if not targets:
        reason = next((f": {name} is kept, {kept[name]}" for name in left), "")
        raise CanopyError(f"{type(model).__name__} has no linear layer left to quantize by {recipe.name}{reason}")
    _check_exceptions(recipe, targets, kept)
    quantized = sum(target.weight.numel() for target in targets if target.kind.multiplies)
    return targets, kept, quantized / max(quantized + sum(left.values()), 1)


def _wish(holder: Holder, recipe: Recipe, heads: list[nn.Module], beside: set[nn.Module]) -> str:
    """Why the recipe keeps a module's weights as they are; "" if it does not."""
    if recipe.ignores(*holder.names):
        return "named in the recipe's ignore list"
    if holder.module in heads and "lm_head" in recipe.ignore:
        return "an output head, as lm_head in the recipe's ignore list"
    if holder.module in beside:
        return "beside the language model, as a vision tower or a projector, which servers compute in 16 bits"
    if isinstance(holder.module, nn.Embedding) and not recipe.embeddings:
        return "an embedding: rows are looked up, not multiplied"
    return ""


def _misfit(holder: Holder, recipe: Recipe) -> str:
    """Why a module's weights cannot be cut as the recipe wants; "" if they can. Of experts, all or none are quantized.

    Raises:
        CanopyError: if the recipe names the module in its exceptions.
    """
    for site in holder.sites:
        try:
            check_fit(site.weight.shape, recipe.scheme_of(*site.names))
        except CanopyError as error:
            if recipe.exception_of(*site.names) is not None:
                raise CanopyError(f"{site.name}: {error}") from None
            return str(error)
    return ""


def _check_ignored(model: nn.Module, recipe: Recipe, holders: list[Holder]) -> None:
    """Refuse what would silently keep nothing. The default entry may: a model need not have a head."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for part in recipe.ignore:
        if part == "lm_head" or any(is_part(part, name) for name in names):
            continue
        experts = any(is_part(part, name) for holder in holders for site in holder.sites for name in site.names)
        reason = "names experts one by one, which are quantized all or none" if experts else "fits no module"
        raise CanopyError(
            f"{shown(part)} of the ignore list of {recipe.name} {reason} of {type(model).__name__}"
            f"{_nearest(part, names)}"
        )


def _check_exceptions(recipe: Recipe, targets: list[Target], kept: dict[str, str]) -> None:
    """Refuse an exception that counts for no weight: what it says would be done is not."""
    counts = {recipe.exception_of(*target.names) for target in targets}
    for number, (part, _) in enumerate(recipe.exceptions):
        if number in counts:
            continue
        fits = [target.names for target in targets if any(is_part(part, name) for name in target.names)]
        if fits:
            earlier = recipe.exceptions[recipe.exception_of(*fits[0])][0]
            reason = f"comes after {shown(earlier)}, which fits the same layers; put it first"
        elif stays := next((name for name in kept if is_part(part, name)), None):
            reason = f"counts for nothing: {stays} is kept ({kept[stays]})"
        else:
            reason = f"fits no layer{_nearest(part, [name for target in targets for name in target.names])}"
        raise CanopyError(f"exception {shown(part)} of {recipe.name} {reason}")


def _nearest(part: str, names: list[str]) -> str:
    """The nearest dotted parts of the names that there are, of as many words."""
    count = part.count(".") + 1
    words = (name.split(".") for name in names)
    known = {".".join(word[i : i + count]) for word in words for i in range(len(word) - count + 1)}
    return did_you_mean(part, sorted(known)) or "; print(model) shows the names"
