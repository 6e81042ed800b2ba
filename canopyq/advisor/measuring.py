"""What a few recipes cost a model, measured on a text: for `advise` to choose from."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from canopyq import checks
from canopyq.advisor.measured import ORIGINAL, Measurement
from canopyq.advisor.needs import misfit
from canopyq.errors import CanopyError
from canopyq.evaluate.text_quality import compare_text
from canopyq.memory import ModelShape
from canopyq.model.quantize import quantize_
from canopyq.tensor.scheme import Recipe
from canopyq.utils import track

# What servers load: 8 bits, 8-bit activations, 4 bits in each group size that Marlin reads.
CANDIDATES = ("w8a16", "w8a8", "fp8", "w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a16-channel")
TOKENS = 4096  # eight windows of 512: they tell the candidates apart


def measure(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    recipes: Iterable[str] | None = None,
    tokens: int = TOKENS,
    source: str = "your text",
) -> list[Measurement]:
    """KL and perplexity of a model under each recipe, rounded to nearest, and in 16-bit arithmetic, on a text.

    The model is left as it is; beside it lies one copy at a time, which is quantized.

    Args:
        model: a transformers causal language model that is not quantized and whose layers are those of a Llama.
        tokenizer: of the model.
        text, tokens: see `compare_text`.
        recipes: of weights, and of activations that need no calibration; None takes those that servers load and whose
            groups fit the model's layers.
        source: what to call the text.

    Raises:
        CanopyError: as `compare_text` and `quantize_`, and for another model, before anything is measured.
    """
    checks.language_model("model", model), checks.text("source", source)
    shape = ModelShape.of(model.config)
    if recipes is None:
        chosen = [recipe for recipe in map(Recipe.parse, CANDIDATES) if misfit(recipe, shape) is None]
    else:
        chosen = [Recipe.of_weights(recipe) for recipe in checks.sequence("recipes", recipes, 1)]
        if static := [recipe.name for recipe in chosen if recipe.static]:
            raise CanopyError(f"{static[0]} needs its activations calibrated; measure the dynamic recipe")
    found = []
    for recipe in track((None, *chosen), "measuring recipes"):
        changed = copy.deepcopy(model)
        if recipe is None:
            changed.bfloat16()
        else:
            quantize_(changed, recipe)
        name = ORIGINAL if recipe is None else recipe.name
        seen = compare_text(model, changed, tokenizer, text, tokens=tokens)
        about = f"{seen.model.tokens:,} tokens of {source}, which the model itself predicts with perplexity "
        about += f"{seen.reference.perplexity:.4g}"
        found.append(Measurement(name, seen.kl, source=about, perplexity=seen.model.perplexity))
    return found
