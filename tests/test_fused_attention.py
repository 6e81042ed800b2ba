"""A model whose attention reads codes gives what it gives on dequantized keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import canopyq as cq
from canopyq import fused_attention
from canopyq.kv_codes import QuantizedStates, get_cache_format
from canopyq.ops import cpu_attention
from canopyq.ops.cuda import attention

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")


def tiny(head_dim: int = 64, **change: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim, "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.3, **change)).eval()


def attend_in_words(query, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, keys, values,
                    format, scaling, starts=None) -> Tensor:  # fmt: skip
    """What the kernel does, from the definition."""

    def whole(codes: Tensor, scale: Tensor, offset: Tensor, per: str, recent: Tensor) -> Tensor:
        states = QuantizedStates(codes, scale, offset, get_cache_format(format), per)
        old = states.dequantize(torch.empty(*codes.shape[:3], recent.shape[3]))
        return torch.cat([old.double(), recent.double()], 2)

    k = whole(key_codes, key_scale, key_offset, "channel", keys)
    v = whole(value_codes, value_scale, value_offset, "token", values)
    group, n, total = query.shape[1] // k.shape[1], query.shape[2], k.shape[2]
    scores = query.double() @ k.repeat_interleave(group, 1).transpose(2, 3) * scaling
    place = torch.arange(total)
    visible = place <= (total - n + torch.arange(n))[:, None]
    if starts is not None:
        visible = visible & (place >= starts[:, None, None, None])
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2).to(query.dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand in for the kernel where there is no GPU; how many tokens each call was for."""
    found: list[int] = []

    def stand_in(query: Tensor, *rest: object) -> Tensor:
        found.append(query.shape[2])
        return attend_in_words(query, *rest)

    monkeypatch.setattr(cpu_attention, "refuse", lambda *_: "it is not asked")
    monkeypatch.setattr(fused_attention, "refuse", lambda *_: None)
    monkeypatch.setattr(attention, "refuse", lambda *_: None)
    monkeypatch.setattr(attention, "attend", stand_in)
    return found


@torch.inference_mode()
def logits(model: LlamaForCausalLM, ids: Tensor, cache: cq.QuantizedCache, mask: Tensor | None = None) -> Tensor:
    """Of the last tokens, in passes of 100, 1, 1, 3 and 1."""
    out, start = [], 0
    for n in (ids.shape[1] - 6, 1, 1, 3, 1):
        now = None if mask is None else mask[:, : start + n]
        result = model(ids[:, start : start + n], past_key_values=cache, attention_mask=now, use_cache=True)
        out.append(result.logits[:, -1])
        start += n
    return torch.stack(out)


@pytest.mark.parametrize("format", ["kv8", "kv4", "kv-fp8"])
@pytest.mark.parametrize("padding", [0, 70])
def test_codes_and_dequantized_values_give_the_same(format: str, padding: int, calls: list[int]) -> None:
    model = tiny()
    ids = torch.randint(97, (2, 206))
    mask = torch.ones(2, 206, dtype=torch.long)
    mask[1, :padding] = 0
    given = mask if padding else None
    plain = logits(model, ids, cq.QuantizedCache(model.config, format), given)
    cq.fuse_attention(model, format)
    fused = logits(model, ids, cq.QuantizedCache(model.config, format), given)
    assert calls == [1, 1, 1, 1, 3, 3, 1, 1]
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, ids, cq.QuantizedCache(model.config, format), given), plain)


@pytest.mark.parametrize("format", ["kv8", "kv4", "kv2", "kv-fp8"])
@pytest.mark.parametrize("mask", ["none", "padding", "holes"])
def test_codes_are_read_on_a_cpu(format: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, given = tiny(), torch.randint(97, (2, 206)), None
    if mask != "none":
        given = torch.ones(2, 206, dtype=torch.long)
        given[1, slice(0, 70) if mask == "padding" else slice(30, 40)] = 0
    plain = logits(model, ids, cq.QuantizedCache(model.config, format), given)
    cq.fuse_attention(model)
    monkeypatch.setattr(QuantizedStates, "dequantize", None)
    fused = logits(model, ids, cq.QuantizedCache(model.config, format), given)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_keys_per_token_and_long_passes_are_dequantized_on_a_cpu() -> None:
    model, ids = tiny(), torch.randint(97, (1, 206))
    plain = logits(model, ids, cq.QuantizedCache(model.config, "kv4", keys="token"))
    cq.fuse_attention(model)
    fused = logits(model, ids, cq.QuantizedCache(model.config, "kv4", keys="token"))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_other_masks_and_caches_are_dequantized(calls: list[int]) -> None:
    model = cq.fuse_attention(tiny())
    ids, holes = torch.randint(97, (1, 206)), torch.ones(1, 206, dtype=torch.long)
    holes[0, 30:40] = 0
    fused = logits(model, ids, cq.QuantizedCache(model.config), holes)
    assert not calls
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(fused, logits(model, ids, cq.QuantizedCache(model.config), holes))


def test_generate_says_the_same(calls: list[int]) -> None:
    model = tiny()
    ids = torch.randint(97, (1, 120))
    plain = model.generate(ids, past_key_values=cq.QuantizedCache(model.config), max_new_tokens=8, do_sample=False)
    cq.fuse_attention(model)
    fused = model.generate(ids, past_key_values=cq.QuantizedCache(model.config), max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, fused) and calls


@pytest.mark.parametrize(
    ("change", "words"),
    [({"attn_logit_softcapping": 30.0}, "capped"), ({"dtype": torch.bfloat16}, "computes in float32")],
)
def test_a_refusal_leaves_the_model_as_it_was(change: dict, words: str) -> None:
    model = tiny(**change) if "dtype" not in change else tiny().to(change["dtype"])
    before = model.config._attn_implementation
    with pytest.raises(cq.CanopyError, match=words):
        cq.fuse_attention(model)
    assert model.config._attn_implementation == before
    assert words in fused_attention.refuse(model)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [0, 70])
@pytest.mark.parametrize("format", ["kv8", "kv4", "kv2", "kv-fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_in_a_model(head_dim: int, format: str, padding: int, dtype: torch.dtype) -> None:
    model = tiny(head_dim).to("cuda", dtype)
    ids = torch.randint(97, (2, 206), device="cuda")
    mask = torch.ones(2, 206, dtype=torch.long, device="cuda")
    mask[1, :padding] = 0
    given = mask if padding else None
    plain = logits(model, ids, cq.QuantizedCache(model.config, format), given)
    cq.fuse_attention(model, format)
    fused = logits(model, ids, cq.QuantizedCache(model.config, format), given)
    assert float((fused - plain).float().norm() / plain.float().norm()) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
