"""A model, quantized or not, as lm-evaluation-harness examines it: its tasks, and so figures that others know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from canopyq import checks

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM


def harness(model: nn.Module, tokenizer: Any, *, batch_size: int = 8, max_length: int | None = None) -> HFLM:
    """The model for ``lm_eval.simple_evaluate(model=…, tasks=[…])``. It stays where it is, in memory and packed.

    ``lm_eval --model hf --model_args pretrained=DIR`` examines what `save` wrote, too; transformers then unpacks it.

    Args:
        model: a causal language model of transformers.
        tokenizer: of it.
        batch_size: requests side by side.
        max_length: tokens that the model sees at most; None takes its context.

    Raises:
        CanopyError: without lm-eval, and for a model or tokenizer that is none.
    """
    checks.language_model("model", model), checks.tokenizer(tokenizer)
    checks.count("batch_size", batch_size, 1)
    if max_length is not None:
        checks.count("max_length", max_length, 2, checks.context(model) or 10**9)
    backend = checks.extra("lm_eval.models.huggingface", "eval")
    device = next(model.parameters()).device
    return backend.HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, device=str(device)
    )
