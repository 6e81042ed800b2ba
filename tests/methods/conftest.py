from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

COMMON = {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 128, "head_dim": 32}  # fmt: skip
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON)),
    "llama tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON, tie_word_embeddings=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**COMMON)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**(COMMON | {"hidden_size": 128}))),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**COMMON)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**COMMON)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**COMMON)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**COMMON, attention_multiplier=0.2)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**COMMON)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**COMMON | {"head_dim": 24})),
    "qwen3 of small heads": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**COMMON | {"head_dim": 24})),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**COMMON)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(vocab_size=96, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
                     max_position_embeddings=64, word_embed_proj_dim=64)
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**COMMON)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2,
                                                           num_attention_heads=4)),
    "bert": lambda: tf.BertLMHeadModel(tf.BertConfig(**COMMON, is_decoder=True)),
    "roberta": lambda: tf.RobertaPreLayerNormForCausalLM(tf.RobertaPreLayerNormConfig(**COMMON, is_decoder=True)),
    "nemotron_h": lambda: tf.NemotronHForCausalLM(  # experts without a gate
        tf.NemotronHConfig(**{name: size for name, size in COMMON.items() if name != "num_hidden_layers"},
                           layers_block_type=["moe", "attention"], n_routed_experts=4, num_experts_per_tok=2,
                           moe_intermediate_size=64, moe_shared_expert_intermediate_size=64)
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=2)),
    "llava": lambda: tf.LlavaForConditionalGeneration(  # whose vision tower has the width of its text
        tf.LlavaConfig(text_config=tf.LlamaConfig(**COMMON), vision_config=tf.CLIPVisionConfig(
            hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14), image_token_index=90)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**COMMON, num_local_experts=3, num_experts_per_tok=2)
    ),
}  # fmt: skip


@pytest.fixture
def make() -> Callable[[str], nn.Module]:
    """A tiny random model whose gains, biases and channels differ from each other as those of trained models do."""

    def build(name: str) -> nn.Module:
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for module in model.modules():
                if type(module).__name__.endswith("Norm"):
                    module.weight.copy_((0.5 + torch.rand_like(module.weight)).to(torch.bfloat16))
                for name, parameter in module.named_parameters(recurse=False):
                    if name.endswith("bias"):
                        parameter.normal_(std=0.1)
            model.get_input_embeddings().weight[:, 5] *= 20  # a loud channel of the residual stream
            for layer in getattr(model.model if hasattr(model, "model") else model, "layers", []):
                if hasattr(getattr(layer, "mlp", None), "up_proj"):
                    layer.mlp.up_proj.weight[3] *= 15  # and one of what goes into down_proj
        return model

    return build


@pytest.fixture
def ids() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (3, 24), generator=generator) for _ in range(4)]


@pytest.fixture
def layer() -> tuple[Tensor, Tensor]:
    """A weight (N, K) and the second moment of correlated inputs with some loud features."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 48, generator=generator) * 0.1
    mix = torch.randn(48, 48, generator=generator) * 0.4 + torch.eye(48)
    x = torch.randn(400, 48, generator=generator) @ mix
    x[:, [4, 30]] *= 12
    return weight, x.t() @ x / len(x)
