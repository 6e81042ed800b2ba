"""What llama.cpp wants to know of a model beside its weights, for the families that `export_gguf` describes itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from canopyq.errors import CanopyError

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp holds a family.

    Attributes:
        name: GGUF's name of it.
        interleaved: it rotates neighbouring values, not halves, so rows of queries and keys are permuted.
        norm_offset: what is added to the weights of norms; Gemma computes with 1 + weight.
        describe: writes what only this family has.
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    describe: Callable[[gguf.GGUFWriter, PretrainedConfig], None] = lambda writer, config: None


def _gemma(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    for name, add in (("attn_logit_softcapping", writer.add_attn_logit_softcapping),
                      ("final_logit_softcapping", writer.add_final_logit_softcapping)):  # fmt: skip
        if value := getattr(config, name, None):
            add(value)


# By transformers' model_type. Llama stands for SmolLM and SmolLM 2 too.
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", norm_offset=1.0, describe=_gemma),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, describe=_gemma),
    "phi3": Architecture("phi3"),
}


def describe(writer: gguf.GGUFWriter, config: PretrainedConfig, architecture: Architecture) -> dict[str, np.ndarray]:
    """Write a model's numbers; returns the tensors that describe its rotary embedding, if it needs any.

    Raises:
        CanopyError: for a rotary embedding that is not known here.
    """
    import gguf

    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    architecture.describe(writer, config)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config, head_dim, float(rope["rope_theta"]))}
    elif kind != "default":
        raise CanopyError(
            f"rotary embeddings of type {kind!r} are not described here; use base= with a GGUF of the model"
        )
    return {}


def context_of(config: PretrainedConfig) -> int:
    """How many tokens the file allows: llama.cpp has no sliding window for Mistral and Phi-3, and none is needed for
    fewer tokens than it holds."""
    window = getattr(config, "sliding_window", None)
    sliding = window is not None and getattr(config, "use_sliding_window", True)
    if not sliding or config.model_type in ("gemma2", "gemma3_text"):
        return config.max_position_embeddings
    return min(window, config.max_position_embeddings)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """The parameters of the rotary embedding; of Gemma 3 those of its layers with full attention."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope["full_attention"]) if "full_attention" in rope else rope


def _llama3_factors(config: PretrainedConfig, head_dim: int, theta: float) -> np.ndarray:
    """By how much Llama 3 slows each frequency, (head_dim / 2,) float32: asked of transformers."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    return (plain / slowed).numpy().astype(np.float32)
