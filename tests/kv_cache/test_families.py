"""Models whose layers are not all full attention: hybrids with recurrent states, chunks, latents, shared keys."""

from __future__ import annotations

import copy
from functools import cache as once

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, Cache, DynamicCache

from canopyq import checks
from canopyq.errors import CanopyError
from canopyq.kv_cache import QuantizedCache, as_argument, cache_nbytes

RECURRENT = hasattr(Cache, "get_conv_state")
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "vocab_size": 99, "max_position_embeddings": 1024, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1,
         "initializer_range": 0.2, "num_hidden_layers": 4}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
       "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}  # fmt: skip
MLA = {"head_dim": 8, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
       "v_head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
ALTERNATE = ["linear_attention", "full_attention"] * 2
SHARED = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "sliding_window": 70, "hidden_size_per_layer_input": 8,
          "layer_types": ["sliding_attention", "full_attention"] * 3, "vocab_size_per_layer_input": 99}  # fmt: skip
HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"], "conv_dim": 64, "block_ff_dim": 64},
    "qwen3_next": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                   "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32, **MOE},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8, "num_experts": 2,
              "num_experts_per_tok": 1, "use_mamba_kernels": False},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA, **MOE, "layer_types": ["mamba", "attention", "mamba", "attention"],
                         "shared_intermediate_size": 32},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 8,
                   "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16, "n_routed_experts": 4,
                   "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "n_mamba_heads": 8,
               "mamba_headdim": 16, "num_key_value_heads": 4, "use_mamba_kernels": False, "num_mem_blocks": 1},
    "kimi_linear": {**MLA, **MOE, "q_lora_rank": None, "num_experts_per_token": 2, "linear_attn_config": {
        "full_attn_layers": [2, 4], "kda_layers": [1, 3], "head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4}},
}  # fmt: skip
FAMILIES = {
    **HYBRIDS,
    "llama4_text": {"attention_chunk_size": 64, "intermediate_size_mlp": 64, "num_local_experts": 2,
                    "num_experts_per_tok": 1},
    "deepseek_v3": {**MLA, **MOE, "first_k_dense_replace": 1},
    "minicpm3": MLA,
    "gemma3n_text": {**SHARED, "laurel_rank": 8, "activation_sparsity_pattern": None, "altup_num_inputs": 2},
    "gemma4_text": {**SHARED, "global_head_dim": 32},
}  # fmt: skip
needs_states = pytest.mark.skipif(not RECURRENT, reason="this transformers does not ask the cache for recurrent states")
EACH = [
    pytest.param(name, marks=needs_states if name in HYBRIDS else ()) for name in FAMILIES if name in CONFIG_MAPPING
]
IDS = torch.randint(3, 99, (2, 300), generator=torch.Generator().manual_seed(1))
PASSES = (150, 1, 1, 100, 1, 20, 1, 1, 25)


@once
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | FAMILIES[name])).eval()


@torch.no_grad()
def feed(model: nn.Module, cache: Cache, passes: tuple[int, ...] = PASSES, start: int = 0) -> Tensor:
    logits = []
    for n in passes:
        logits.append(model(input_ids=IDS[:, start : start + n], use_cache=True, **as_argument(cache)).logits)
        start += n
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", EACH)
def test_it_is_transformers_cache_but_for_the_rounding(name: str) -> None:
    """With nothing quantized yet the same numbers; with 8 bits nearly those, in less memory."""
    model = model_of(name)
    full = DynamicCache(config=model.config)
    expected = feed(model, full)
    waiting = QuantizedCache(model.config, residual_length=1000)
    torch.testing.assert_close(feed(model, waiting), expected, rtol=1e-4, atol=1e-4)
    cache = QuantizedCache(model.config, "kv8")
    p, q = expected.log_softmax(-1), feed(model, cache).log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 5e-3
    assert cache.get_seq_length() == 300
    assert any(cache.layers[i].quantized_tokens >= 64 for i in cache.attention)
    assert cache.nbytes < 0.6 * cache_nbytes(full)


@needs_states
@pytest.mark.parametrize("name", ["lfm2", "falcon_h1", "nemotron_h"])
def test_an_interrupted_pass_leaves_no_trace_in_recurrent_states(name: str) -> None:
    model = model_of(name)
    cache = QuantizedCache(model.config, "kv4")
    feed(model, cache, (150, 1))
    other = cache.copy()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for passes in ((40,), (1,)):
        hook = next(x for x in model.modules() if isinstance(x, nn.ModuleList))[1].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            feed(model, cache, passes, 151)
        hook.remove()
        assert cache.get_seq_length() == 151
        with pytest.raises(CanopyError, match="was undone"):
            feed(model, cache, (1,), 151)
    assert torch.equal(feed(model, cache, (1, 5), 151), feed(model, other, (1, 5), 151))


@needs_states
@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_beams_take_their_recurrent_states_along(name: str) -> None:
    model = model_of(name)

    def beams(cache: Cache) -> Tensor:
        given = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones(2, 90).long()}
        return model.generate(IDS[:, :90], **given, **as_argument(cache))

    expected = beams(DynamicCache(config=model.config))
    assert torch.equal(beams(QuantizedCache(model.config, residual_length=1000)), expected)


@needs_states
def test_what_recurrent_states_cannot_do_is_refused() -> None:
    model = model_of("qwen3_next")
    cache = QuantizedCache(model.config)
    feed(model, cache, (150,))
    for use in (lambda: cache.crop(-1), lambda: cache.batch_repeat_interleave(2),
                lambda: cache.batch_select_indices(torch.tensor([0]))):  # fmt: skip
        with pytest.raises(CanopyError, match="recurrent state"):
            use()
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mamba", {}, "MambaForCausalLM"),
        ("minimax", {"layer_types": ALTERNATE}, "minimax"),
        ("recurrent_gemma", {}, "recurrent_gemma"),
        ("llama", {"layer_types": ["full_attention", "hashed_attention"] * 2}, "layer 1 .* hashed_attention"),
    ],
)
def test_what_has_no_keys_and_values_is_refused(name: str, options: dict, words: str) -> None:
    config = AutoConfig.for_model(name, num_hidden_layers=4)
    for key, value in options.items():
        setattr(config, key, value)
    with pytest.raises(CanopyError, match=words):
        QuantizedCache(config)


@pytest.mark.parametrize("rope", ["yarn", "linear", "dynamic"])
def test_scaled_rotary_embedding_reaches_beyond_the_trained_length(rope: str) -> None:
    torch.manual_seed(0)
    options = {"rope_parameters": {"rope_type": rope, "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES | options)).eval()
    fresh = copy.deepcopy(model)  # dynamic tables stay as long as the longest text before
    expected = feed(fresh, DynamicCache(config=model.config), (150, 1, 1, 100, 4))
    cache = QuantizedCache(model.config, residual_length=1000)
    torch.testing.assert_close(feed(model, cache, (150, 1, 1, 100, 4)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CanopyError, match="257 tokens .* 256"):
        feed(model, cache, (1,), 256)


@pytest.mark.parametrize(
    ("trained", "rope", "reach"),
    [
        (4096, {"rope_type": "linear", "factor": 4.0}, 16384),
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen 2.5
        (163840, {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}, 163840),  # DeepSeek
        (131072, {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192,
                  "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 131072),  # Llama 3.2
        (2048, {"rope_type": "default"}, 2048),
    ],
)  # fmt: skip
def test_how_many_tokens_a_config_takes(trained: int, rope: dict, reach: int) -> None:
    config = AutoConfig.for_model("llama", max_position_embeddings=trained, rope_parameters={"rope_theta": 1e4, **rope})
    assert checks.context(config) == reach
