"""Mixed precision: spend a budget of bits where the KL falls most.

Each layer is quantized alone, in every scheme there is to choose from, and the KL that this costs is measured on a
little data. Then all layers begin in the cheapest scheme, and the budget goes step by step to the layer and scheme that
take away the most KL per bit. The KLs of layers are taken to add up, which holds as long as each is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canopyq import checks
from canopyq.calibration.data import Batch, read_batches
from canopyq.errors import CanopyError, prefixed, shown
from canopyq.nn.targets import Target, find_targets
from canopyq.tensor.quantized_tensor import quantize_unpacked, quantized_bytes
from canopyq.tensor.scheme import Recipe
from canopyq.utils import eval_mode, track

CHOICES = ("w2a16-g64", "w4a16-g128", "w8a16-g128")


@torch.no_grad()
def sensitivity(model: nn.Module, recipe: str | Recipe, data: Any, tokenizer=None) -> dict[str, float]:
    """What quantizing each layer alone costs: name -> KL to the model as it is, in nats per token, on ``data``.

    Args:
        recipe: how; only what it says of weights counts.
        data, tokenizer: see `batches.read_batches`. A thousand tokens tell the layers apart.

    Raises:
        CanopyError: as `quantize_`, before anything is changed.
    """
    recipe = Recipe.of_weights(recipe)
    checks.language_model("model", model)
    batches = read_batches(data, model, tokenizer)
    targets, _, _ = find_targets(model, recipe)
    return _costs(model, targets, batches)


def mixed_precision(
    model: nn.Module, budget: float, data: Any, tokenizer=None, *, choices: Sequence[str] = CHOICES
) -> Recipe:
    """The recipe that spends ``budget`` bits per weight, scales included, where the KL falls most.

    It goes to `quantize_`, with any method. The search itself rounds to nearest.

    Args:
        model: it is left as it was.
        budget: bits per quantized weight, on average.
        data, tokenizer: see `sensitivity`.
        choices: names of recipes for weights alone, among which every layer has one.

    Raises:
        CanopyError: for a budget below the cheapest choice, fewer than two choices, choices with activations, and as
            `sensitivity`.
    """
    checks.language_model("model", model), checks.number("budget", budget, 0.1, 64)
    recipes = [Recipe.of_weights(choice) for choice in checks.sequence("choices", choices)]
    if len(recipes) < 2 or any(recipe.activations is not None or recipe.exceptions for recipe in recipes):
        raise CanopyError(f"choices={shown(choices)} are not two or more recipes for weights alone; give such")
    by_choice = [find_targets(model, recipe)[0] for recipe in recipes]
    everywhere = set.intersection(*({target.name for target in targets} for targets in by_choice))
    by_choice = [[target for target in targets if target.name in everywhere] for targets in by_choice]
    names = [target.name for target in by_choice[0]]
    bits = [
        {
            target.name: 8 * quantized_bytes(target.weight.shape, target.scheme, target.weight.dtype)
            for target in targets
        }
        for targets in by_choice
    ]
    order = sorted(range(len(recipes)), key=lambda i: sum(bits[i].values()))
    weights = sum(target.weight.numel() for target in by_choice[0])
    cheapest = sum(bits[order[0]].values())
    if cheapest > budget * weights:
        raise CanopyError(
            f"{recipes[order[0]].name} alone takes {cheapest / weights:.3f} bits per weight, more than the budget of "
            f"{budget:g}; raise it, or give a cheaper choice"
        )
    batches = read_batches(data, model, tokenizer)
    costs = [_costs(model, targets, batches) for targets in by_choice]
    chosen = dict.fromkeys(names, order[0])
    left = budget * weights - cheapest
    while step := _best_step(chosen, order, bits, costs, left):
        name, choice = step
        left -= bits[choice][name] - bits[chosen[name]][name]
        chosen[name] = choice
    base = recipes[order[0]]
    exceptions = tuple((name, recipes[i].weights) for name, i in chosen.items() if i != order[0])
    return replace(base, name=f"mixed-{budget:g}", exceptions=exceptions)


def _best_step(
    chosen: dict[str, int], order: list[int], bits: list[dict[str, int]], costs: list[dict[str, float]], left: float
) -> tuple[str, int] | None:
    """The layer and the choice that take away the most KL per bit, of those that the budget still allows."""
    best, gain = None, 0.0
    for name, now in chosen.items():
        for choice in order[order.index(now) + 1 :]:
            more = bits[choice][name] - bits[now][name]
            less = costs[now][name] - costs[choice][name]
            if 0 < more <= left and less / more > gain:
                best, gain = (name, choice), less / more
    return best


@torch.no_grad()
def _costs(model: nn.Module, targets: list[Target], batches: list[Batch]) -> dict[str, float]:
    """KL of each target's rounding alone."""
    costs = {}
    with eval_mode(model):
        reference = _log_probs(model, batches)
        for target in track(targets, "quantizing each layer alone", len(targets)):
            with prefixed(f"{target.name}: "):
                rounded = quantize_unpacked(target.weight, target.scheme).dequantize(target.weight.dtype)
            original = target.weight.clone()
            try:
                target.weight.copy_(rounded)
                found = _log_probs(model, batches)
            finally:
                target.weight.copy_(original)
            costs[target.name] = float((reference.exp() * (reference - found)).sum(-1).mean())
    return costs


def _log_probs(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Of the next token, at every real position: (tokens, vocabulary)."""
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        arguments = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.arguments.items()}
        logits = model(**arguments, use_cache=False).logits
        found.append(F.log_softmax(logits[batch.real.to(device)].float(), dim=-1))
    return torch.cat(found)
