"""Attention that reads the codes of a `QuantizedCache`, for transformers models: `fuse_attention`.

transformers lets a model's attention be chosen by name. Under the name that is registered here a cache hands out codes
instead of dequantized keys and values, for passes over few tokens. On an NVIDIA GPU the CUDA kernel takes them, on a
CPU `kernels/cpu_attention.py`. Every other pass is transformers' own attention on dequantized values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.kernels import cpu_attention
from canopyq.kernels.cuda import attention
from canopyq.kv_cache.cache import ATTENTION
from canopyq.kv_cache.quantized_kv import KVView
from canopyq.tensor.formats import CacheFormat, get_cache_format, kv_group_size


def fuse_attention(model: nn.Module, format: str | CacheFormat = "kv8") -> nn.Module:
    """Let a model's attention read codes from a `QuantizedCache` of this format. Returns the model.

    ``model.set_attn_implementation("sdpa")`` undoes it. Padding on the left is understood; with a mask of any other
    form the values are dequantized first.

    Raises:
        CanopyError: if the kernel cannot run here, or not with this model, with the reason.
    """
    config = checks.language_model("model", model).config.get_text_config(decoder=True)
    if reason := unsupported_reason(model, format):
        raise CanopyError(f"attention on codes cannot run in this {config.model_type}: {reason}")
    AttentionInterface.register(ATTENTION, attend_cached)
    AttentionMaskInterface.register(ATTENTION, mask_of_pass)
    model.set_attn_implementation(ATTENTION)
    return model


def unsupported_reason(model: nn.Module, format: str | CacheFormat = "kv8") -> str | None:
    """Why a model's attention cannot read codes, or None if it can."""
    codes = get_cache_format(format)
    config = model.config.get_text_config(decoder=True)
    for name in ("attn_logit_softcapping", "attn_logits_soft_cap"):
        if getattr(config, name, None):
            return f"its scores are capped ({name} in its config), which the kernel does not do"
    if getattr(config, "kv_lora_rank", None):
        return "its cache holds latents, from which keys and values are computed"
    if getattr(config, "num_kv_shared_layers", None):
        return "its layers read each other's keys and values"
    if config.model_type == "gpt_oss":
        return "its attention has sinks, which the kernel does not know"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weight = next(model.parameters())
    if weight.device.type == "cpu":
        return cpu_attention.unsupported_reason(weight.dtype, "channel", weight.device)
    group_size = kv_group_size(head_dim)
    return attention.unsupported_reason(codes, head_dim, weight.dtype, "channel", group_size, weight.device)


def mask_of_pass(*sizes: int, **given: object) -> Tensor | None:
    """transformers' mask. None, which says causal, while a CUDA graph is captured: a mask would stay as long as the
    context is then."""
    causal = given.get("mask_function", causal_mask_function) is causal_mask_function
    if causal and given.get("attention_mask") is None and _capturing():
        return None
    return sdpa_mask(*sizes, **given)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def attend_cached(
    module: nn.Module,
    query: Tensor,
    key: Tensor | KVView,
    value: Tensor | KVView,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, heads, n, D) -> (B, n, heads, D)."""
    if isinstance(key, KVView):
        view, scale = key, query.shape[3] ** -0.5 if scaling is None else scaling
        growing = view.before is None  # the processor's kernel reads what a cache holds, not a buffer of fixed size
        granularity = view.quantized_keys.granularity
        on_cpu = growing and cpu_attention.unsupported_reason(query.dtype, granularity, query.device) is None
        if on_cpu and dropout == 0.0 and (attention_mask is None or attention_mask.dtype == torch.bool):
            return cpu_attention.attend(query, view, scale, attention_mask), None
        starts, simple = _starts(attention_mask, view)
        if simple and dropout == 0.0 and _readable(query, view):
            return attention.attend(query, view, scale, starts), None
        key, value = view.dequantized()
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _readable(query: Tensor, view: KVView) -> bool:
    """A cache may be of another form than the one that `fuse_attention` was asked about."""
    keys, group_size = view.quantized_keys, view.quantized_values.group_size
    form = (keys.format, query.shape[3], query.dtype, keys.granularity, group_size, query.device)
    return attention.unsupported_reason(*form) is None


def _starts(mask: Tensor | None, view: KVView) -> tuple[Tensor | None, bool]:
    """How many of each row's first tokens are hidden (B,), None for none; and whether the mask hides nothing else but
    what comes after a token."""
    if mask is None:
        return None, True
    if mask.dtype != torch.bool or mask.dim() != 4:
        return None, False
    if _capturing():
        raise CanopyError("a captured step takes no attention mask, which would stay as it is; leave padding out")
    if getattr(mask, "_canopyq_starts", None) is None:  # every layer of a pass has the same mask: look at it once
        tokens, total = mask.shape[2:]
        place = torch.arange(total, device=mask.device)
        starts = mask[:, 0, -1].int().argmax(-1)
        causal = place <= (total - tokens + torch.arange(tokens, device=mask.device))[:, None]
        simple = bool((mask == (causal & (place >= starts[:, None, None, None]))).all())
        mask._canopyq_starts = starts.to(torch.int32), simple
    starts, simple = mask._canopyq_starts
    return starts, simple and mask.shape[3] == view.tokens
