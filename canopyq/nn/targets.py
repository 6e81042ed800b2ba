"""Which weights of a model a recipe quantizes, and why every other one is kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from canopyq.errors import CanopyError, did_you_mean, shown
from canopyq.nn.linear import quantized_layers
from canopyq.nn.sites import Holder, Site, output_heads, weight_holders
from canopyq.tensor.scheme import Recipe, Scheme, is_part


@dataclass(frozen=True, eq=False)
class Target(Site):
    """One weight that will be quantized.

    Attributes:
        scheme: how.
    """

    scheme: Scheme


def find_targets(model: nn.Module, recipe: Recipe) -> tuple[list[Target], dict[str, str]]:
    """What to quantize, in the model's order, and for every other module that holds a weight, why it is kept.

    Raises:
        CanopyError: if the model is quantized already, has lazy weights, or nothing to quantize; for an entry of the
            recipe's ignore list that fits no module, and an exception that counts for no weight.
    """
    targets: list[Target] = []
    kept: dict[str, str] = {}
    holders, heads = weight_holders(model), output_heads(model)
    _check_ignored(model, recipe, holders)
    if already := next(quantized_layers(model), None):
        raise CanopyError(f"{already[0] or 'the model'} is quantized already; start from a freshly loaded model")
    for holder in holders:
        label = holder.name or "the model"
        if reason := _reason(holder, recipe, heads):
            kept[label] = reason
        elif not holder.name:
            raise CanopyError(
                f"a bare {type(model).__name__} has no place to be replaced in; use QuantizedLinear.from_linear"
            )
        else:
            targets += [Target(**vars(site), scheme=recipe.scheme_of(*site.names)) for site in holder.sites]
    if not targets:
        raise CanopyError(f"{type(model).__name__} has no linear layer left to quantize by {recipe.name}")
    _check_exceptions(recipe, targets, kept)
    return targets, kept


def _reason(holder: Holder, recipe: Recipe, heads: list[nn.Module]) -> str:
    """Why a module's weights are kept as they are; "" if they are not."""
    if recipe.ignores(*holder.names):
        return "named in the recipe's ignore list"
    if holder.module in heads and "lm_head" in recipe.ignore:
        return "an output head, as lm_head in the recipe's ignore list"
    if isinstance(holder.module, nn.Embedding) and not recipe.embeddings:
        return "an embedding: rows are looked up, not multiplied"
    return holder.reason


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
