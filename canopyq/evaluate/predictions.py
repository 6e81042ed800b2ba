"""What a model predicts of given tokens, through a KV cache or none, and how far two models' predictions lie apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canopyq.errors import CanopyError
from canopyq.nn.offload import input_device
from canopyq.tensor.formats import KV_BLOCK, get_cache_format

CacheMaker = Callable[[Any], Any]  # from a model's config to a transformers cache


def cache_maker(cache: str | CacheMaker | None) -> CacheMaker | None:
    """The function that a caller gave, or that of the cache format whose name it is; None where none is asked for."""
    if cache is None or (callable(cache) and not isinstance(cache, (type, nn.Module))):
        return cache
    from canopyq.kv_cache import QuantizedCache

    format = get_cache_format(cache)
    return lambda config: QuantizedCache(config, format)


def log_probs_of(model: nn.Module, ids: Tensor, cache: Any = None) -> Tensor:
    """Next-token log-probabilities (B, T − 1, vocabulary), float32."""
    ids = ids.to(input_device(model))
    if cache is None:
        logits = model(input_ids=ids, use_cache=False).logits
    else:
        from canopyq.kv_cache import as_argument

        parts, tokens = [], 0
        while tokens < ids.shape[1]:
            new = ids[:, tokens : tokens + getattr(cache, "tokens_until_flush", KV_BLOCK)]
            parts.append(model(input_ids=new, use_cache=True, **as_argument(cache)).logits)
            tokens += new.shape[1]
        logits = torch.cat(parts, 1)
    log_probs = F.log_softmax(logits[:, :-1].float(), dim=-1)
    if not bool(log_probs.isfinite().all()):
        raise CanopyError("the model's logits are not finite; look for NaN or infinite weights or scales")
    return log_probs


def full_cache_bytes(model: nn.Module) -> int:
    """Storage that a token takes in transformers' own cache, in the dtype that the model computes in."""
    from transformers import DynamicCache

    from canopyq.kv_cache import as_argument, cache_nbytes

    cache = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    model(input_ids=token, use_cache=True, **as_argument(cache))
    return cache_nbytes(cache)


def kl_divergences(reference: Tensor, model: Tensor) -> Tensor:
    """Σ_v p(v) · (log p(v) − log q(v)) of each token, for log-probabilities (tokens, vocabulary)."""
    if reference.shape[-1] != model.shape[-1]:
        raise CanopyError(
            f"vocabularies of {reference.shape[-1]} and {model.shape[-1]} tokens cannot be compared token by token"
        )
    reference = reference.to(model.device)
    return (reference.exp() * (reference - model)).sum(-1)
