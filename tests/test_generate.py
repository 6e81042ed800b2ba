"""fast_generate against transformers' own generate."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.evaluate.generate import Decoder, fast_generate
from canopyq.memory import bytes_held
from canopyq.nn.fused_linear import UnfusedLinears, fuse_linears

SIZES = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=96, max_position_embeddings=128, pad_token_id=0, eos_token_id=5)  # fmt: skip
ROPE = {"rope_theta": 10_000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"tie_word_embeddings": True} | changes)).eval()


def qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(part.bias)
    return model


def prompts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(6, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "make", [llama, qwen, lambda: llama(rope_parameters=ROPE)], ids=["llama", "qwen2-with-bias", "llama3-rope"]
)
@pytest.mark.parametrize("recipe", [None, "w4a16-g32-asym", "w3a16-g32"])
def test_it_gives_what_transformers_gives(make, recipe) -> None:
    model = make()
    if recipe:
        cq.quantize_(model, recipe)
    ids = prompts(3, 9)
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
    assert torch.equal(fast_generate(model, ids, 40), expected)


def test_sequences_end_at_their_end_token_and_are_padded() -> None:
    model, ids = llama(), prompts(4, 6)
    first = fast_generate(model, ids, 30)
    end = int(first[1, 10])  # whatever the second sequence says then
    model.generation_config.eos_token_id = [end, 96]
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)
    assert torch.equal(fast_generate(model, ids, 30), expected)
    assert fast_generate(model, ids[1:2], 30, eos_token_id=end).shape[1] <= 11


def test_a_decoder_serves_many_prompts() -> None:
    model = llama()
    decoder = Decoder(model, 2, 40)
    for length in (3, 20, 7):
        ids = prompts(2, length)
        assert torch.equal(decoder.generate(ids, 12), fast_generate(model, ids, 12))
    with pytest.raises(CanopyError, match="2 sequences of 40 tokens; 2 of 30 \\+ 12"):
        decoder.generate(prompts(2, 30), 12)


def test_joined_layers_take_no_memory_of_their_own() -> None:
    model = llama()
    cq.quantize_(model, "w3a16-g32")
    before, bytes_before = deepcopy(model), bytes_held(model)
    Decoder(model, 1, 10)
    assert bytes_held(model) == bytes_before
    ids = prompts(1, 5)
    assert torch.equal(model(ids).logits, before(ids).logits)  # the single layers still answer, from shared memory
    assert set(model.state_dict()) == set(before.state_dict())


def test_what_cannot_be_joined_is_run_separately_and_says_why() -> None:
    plain = torch.nn.Linear(32, 8)
    quantized = cq.QuantizedLinear.from_linear(torch.nn.Linear(32, 8), cq.Scheme("int3", "g32"))
    per_tensor = [cq.QuantizedLinear.from_linear(torch.nn.Linear(32, 8), cq.Scheme("int3", "tensor")) for _ in "ab"]
    x = torch.randn(2, 32)
    for layers, reason in [
        ((plain, quantized), "different kinds"),
        ((plain, torch.nn.Linear(32, 8, bias=False)), "only some of them have a bias"),
        (per_tensor, "a scale per tensor"),
    ]:
        both = fuse_linears(*layers)
        assert isinstance(both, UnfusedLinears) and reason in both.reason
        assert torch.equal(both(x), torch.cat([layer(x) for layer in layers], dim=-1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
@pytest.mark.parametrize("recipe", [None, "w4a16-g128", "w4a16-g128-asym", "w8a16", "w8a8", "fp8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_graph_gives_what_its_steps_give(recipe, rows) -> None:
    sizes = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1024)
    model = llama(**sizes, dtype=torch.bfloat16).to("cuda", torch.bfloat16)
    if recipe:
        cq.quantize_(model, recipe)
    ids = prompts(rows, 9)
    decoder = Decoder(model, rows, 60)
    assert decoder.notes == []
    found = decoder.generate(ids, 40)
    logits = model(found[:, :-1].contiguous()).logits[:, -1].float()
    rounding = 0.06 if recipe == "fp8" else 0.02  # a code of E4M3 is up to 6 % from the next
    assert (decoder.logits.float() - logits).norm() < rounding * logits.norm()
    assert decoder.graph is not None
    decoder._record = lambda: None
    decoder.graph = None
    assert torch.equal(decoder.generate(ids, 40), found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fast_generate(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)), prompts(1, 3)), "not gpt2"),
        (lambda: fast_generate(llama(), prompts(1, 100), 50), "context of 128"),
    ],
)
def test_what_it_does_not_do_is_said(call, message) -> None:
    with pytest.raises(CanopyError, match=message):
        call()
