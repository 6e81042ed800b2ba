"""The tutor as a model of transformers that has learned nothing yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from training.tokenizer import BOS, CONTEXT, END, PAD, VOCABULARY


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama. The defaults are the tutor's: 8.2 million parameters, just under 16 MiB in bfloat16."""

    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 1024

    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": BOS,
            "eos_token_id": END,
            "pad_token_id": PAD,
            "dtype": "bfloat16",
        }


def build(shape: Shape, seed: int, stream_dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model with float32 weights, drawn anew: the same ones for the same seed.

    The embedding has a standard deviation of 0.02, a matrix one over the root of its inputs, and half of that where its
    outputs enter the residual stream. ``stream_dtype`` is the dtype of that stream, to which the embedding is rounded.
    """
    model = LlamaForCausalLM(LlamaConfig(**shape.config() | {"dtype": torch.float32}))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "embed" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim == 2:
            into_stream = "o_proj" in name or "down_proj" in name
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * (0.5 if into_stream else 1.0))

    def rounded(_module: nn.Module, _inputs: tuple, embedded: Tensor) -> Tensor:
        return embedded.to(stream_dtype)

    model.model.embed_tokens.register_forward_hook(rounded)
    return model
