"""A model whose attention reads codes gives what it gives on dequantized keys and values. A cache of fixed size holds
what the growing one holds, and a CUDA graph can replay a step with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import canopyq as cq
from canopyq.evaluate.generate import Decoder
from canopyq.kernels import cpu_attention
from canopyq.kernels.cuda import attention
from canopyq.kv_cache import as_argument
from canopyq.kv_cache import attention as fused_attention
from canopyq.kv_cache.quantized_kv import KVView, QuantizedKV

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")


def tiny(head_dim: int = 64, **change: object) -> LlamaForCausalLM:
    """In float32; `.double()` where codes are compared: then the order of sums decides between two codes of no number,
    and what is left are the roundings of norms and codes to float32."""
    torch.manual_seed(0)
    config = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim, "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.3, **change)).eval()


def attend_in_words(query: Tensor, view: KVView, scaling: float, starts: Tensor | None = None) -> Tensor:
    """What the kernel does, from the definition."""
    n, total, old = query.shape[2], view.keys.shape[2], view.quantized_keys.tokens
    slots = torch.arange(total)
    if view.before is not None:
        start = int(view.before)
        old = max(start - view.residual_length, 0) // 64 * 64
        slots = torch.arange(old, start + n) % total

    def whole(quantized: QuantizedKV, recent: Tensor) -> Tensor:
        recent = recent[:, :, slots].double()
        if not old:
            return recent
        before = quantized.part(0, old).dequantize(recent.new_empty(*recent.shape[:2], old, recent.shape[3]))
        return torch.cat([before, recent], 2)

    k, v = whole(view.quantized_keys, view.keys), whole(view.quantized_values, view.values)
    group, total = query.shape[1] // k.shape[1], k.shape[2]
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

    monkeypatch.setattr(cpu_attention, "unsupported_reason", lambda *_: "it is not asked")
    monkeypatch.setattr(fused_attention, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(attention, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(attention, "attend", stand_in)
    return found


@torch.inference_mode()
def logits(model: LlamaForCausalLM, ids: Tensor, cache: cq.QuantizedCache, mask: Tensor | None = None) -> Tensor:
    """Of the last tokens, in passes of 100, 1, 1, 3 and 1."""
    out, start = [], 0
    for n in (ids.shape[1] - 6, 1, 1, 3, 1):
        now = None if mask is None else mask[:, : start + n]
        result = model(ids[:, start : start + n], **as_argument(cache), attention_mask=now, use_cache=True)
        out.append(result.logits[:, -1])
        start += n
    return torch.stack(out)


@pytest.mark.parametrize("format", ["kv8", "kv4", "kv-fp8"])
@pytest.mark.parametrize("padding", [0, 70])
def test_codes_and_dequantized_values_give_the_same(format: str, padding: int, calls: list[int]) -> None:
    model = tiny().double()
    ids = torch.randint(97, (2, 206))
    mask = torch.ones(2, 206, dtype=torch.long)
    mask[1, :padding] = 0
    given = mask if padding else None
    plain = logits(model, ids, cq.QuantizedCache(model.config, format), given)
    cq.fuse_attention(model, format)
    fused = logits(model, ids, cq.QuantizedCache(model.config, format), given)
    assert calls == [1, 1, 1, 1, 3, 3, 1, 1]
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, ids, cq.QuantizedCache(model.config, format), given), plain)


@pytest.mark.parametrize("format", ["kv8", "kv4", "kv2", "kv-fp8"])
@pytest.mark.parametrize("mask", ["none", "padding", "holes"])
def test_codes_are_read_on_a_cpu(format: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, given = tiny().double(), torch.randint(97, (2, 206)), None
    if mask != "none":
        given = torch.ones(2, 206, dtype=torch.long)
        given[1, slice(0, 70) if mask == "padding" else slice(30, 40)] = 0
    plain = logits(model, ids, cq.QuantizedCache(model.config, format), given)
    cq.fuse_attention(model)
    monkeypatch.setattr(QuantizedKV, "dequantize", None)
    fused = logits(model, ids, cq.QuantizedCache(model.config, format), given)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_keys_per_token_and_long_passes_are_dequantized_on_a_cpu() -> None:
    model, ids = tiny().double(), torch.randint(97, (1, 206))
    plain = logits(model, ids, cq.QuantizedCache(model.config, "kv4", key_granularity="token"))
    cq.fuse_attention(model)
    fused = logits(model, ids, cq.QuantizedCache(model.config, "kv4", key_granularity="token"))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_other_masks_and_caches_are_dequantized(calls: list[int]) -> None:
    model = cq.fuse_attention(tiny().double())
    ids, holes = torch.randint(97, (1, 206)), torch.ones(1, 206, dtype=torch.long)
    holes[0, 30:40] = 0
    fused = logits(model, ids, cq.QuantizedCache(model.config), holes)
    assert not calls
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(fused, logits(model, ids, cq.QuantizedCache(model.config), holes))


def test_generate_says_the_same(calls: list[int]) -> None:
    model = tiny().double()
    ids = torch.randint(97, (1, 120))
    plain = model.generate(ids, **as_argument(cq.QuantizedCache(model.config)), max_new_tokens=8, do_sample=False)
    cq.fuse_attention(model)
    fused = model.generate(ids, **as_argument(cq.QuantizedCache(model.config)), max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, fused) and calls


@pytest.mark.parametrize(
    ("change", "words"),
    [({"attn_logit_softcapping": 30.0}, "capped"), ({"dtype": torch.bfloat16}, "torch.bfloat16")],
)
def test_a_refusal_leaves_the_model_as_it_was(change: dict, words: str) -> None:
    model = tiny(**change) if "dtype" not in change else tiny().to(change["dtype"])
    before = model.config._attn_implementation
    with pytest.raises(cq.CanopyError, match=words):
        cq.fuse_attention(model)
    assert model.config._attn_implementation == before
    assert words in fused_attention.unsupported_reason(model)


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
    wide = tiny(head_dim)
    exact = logits(wide, ids.cpu(), cq.QuantizedCache(wide.config, format), None if given is None else given.cpu())
    # Random weights blow roundings up: reading codes may change no more than the model's own 16 bits do.
    assert (fused - plain).float().norm() < 0.5 * (plain.float().cpu() - exact).norm()


# ---------------------------------------- the cache of fixed size

FORMATS = ["kv8", "kv4", "kv2", "kv-fp8"]


def make(model, format: str, capacity: int = 300, batch: int = 1, **options: object) -> cq.StaticQuantizedCache:
    weight = next(model.parameters())
    given = {"batch": batch, "capacity": capacity, "dtype": weight.dtype, "device": weight.device} | options
    return cq.StaticQuantizedCache(model.config, format, **given)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does, where there is no GPU."""
    monkeypatch.setattr(cpu_attention, "unsupported_reason", lambda *_: "it is not asked")
    monkeypatch.setattr(fused_attention, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(attention, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(attention, "attend", attend_in_words)


@torch.inference_mode()
def passes_of(model, ids: Tensor, cache, passes: tuple[int, ...]) -> Tensor:
    out, start = [], 0
    for n in passes:
        out.append(model(ids[:, start : start + n], **as_argument(cache), use_cache=True).logits[:, -1])
        start += n
    return torch.stack(out)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("format", "residual_length"), [("kv8", 0), ("kv8", 70), ("kv4", 32), ("kv2", 32), ("kv-fp8", 32)]
)
def test_it_holds_what_the_growing_cache_holds(format: str, residual_length: int) -> None:
    model = cq.fuse_attention(tiny().double(), format)
    ids, passes = torch.randint(97, (2, 270)), (120, 1, 16, 1, 5, *[16] * 7, 15)
    growing = cq.QuantizedCache(model.config, format, residual_length=residual_length)
    fixed = make(model, format, batch=2, residual_length=residual_length)
    ours, theirs = passes_of(model, ids, fixed, passes), passes_of(model, ids, growing, passes)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(fixed.layers, growing.layers, strict=True):
        count = theirs.quantized_keys.tokens
        assert ours.get_seq_length() == theirs.get_seq_length() == int(fixed.count) == 270
        slots = torch.arange(count, 270) % ours.keys.shape[2]
        torch.testing.assert_close(ours.keys[:, :, slots], theirs.keys, rtol=1e-3, atol=1e-4)
        for a, b in ((ours.quantized_keys, theirs.quantized_keys), (ours.quantized_values, theirs.quantized_values)):
            same = (a.narrow(0, count).codes.view(torch.uint8) == b.codes.view(torch.uint8)).float().mean()
            assert same > 0.98  # the logits before differ by rounding, and with them a few keys of later layers
            assert torch.allclose(a.narrow(0, count).scale.float(), b.scale.float(), rtol=1e-2)


@pytest.mark.usefixtures("stand_in")
def test_it_takes_no_more_than_it_has_room_for() -> None:
    model = cq.fuse_attention(tiny())
    cache = make(model, "kv8", capacity=128)
    ids = torch.randint(97, (1, 140))
    with pytest.raises(cq.CanopyError, match="capacity of 128 tokens, not of 129"):
        model(ids[:, :129], **as_argument(cache))
    model(ids[:, :20], **as_argument(cache))
    with pytest.raises(cq.CanopyError, match="only when it is empty, and it holds 20"):
        model(ids[:, 20:50], **as_argument(cache))
    cache.reset()
    assert cache.get_seq_length() == 0 and torch.equal(cache.position_ids(2), torch.tensor([[0, 1]]))
    model(ids[:, :128], **as_argument(cache))
    with pytest.raises(cq.CanopyError, match="not of 129"):
        model(ids[:, 128:129], **as_argument(cache))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("format", ["kv8", "kv2"])
def test_fast_generate_holds_codes_as_the_growing_cache_does(format: str) -> None:
    """The same cache, attention and rounding, so the same tokens; a second prompt finds it empty."""
    model = cq.fuse_attention(tiny().double(), format)
    ids = torch.randint(97, (2, 130))
    decoder = Decoder(model, 2, 260, format)
    for start in (130, 20):
        found = decoder.generate(ids[:, :start], 100)
        cache = cq.QuantizedCache(model.config, format)
        expected = model.generate(ids[:, :start], **as_argument(cache), max_new_tokens=100, do_sample=False)
        assert torch.equal(found, expected)
        assert decoder.cache.synchronize() == start + 99


def test_fast_generate_says_why_it_does_not_hold_codes() -> None:
    with pytest.raises(cq.CanopyError, match=r"cannot read a kv8 cache here: it is for NVIDIA GPUs.*QuantizedCache"):
        cq.fast_generate(tiny(), torch.ones(1, 3, dtype=torch.long), 5, cache="kv8")
    with pytest.raises(cq.CanopyError, match="kv9"):
        cq.fast_generate(tiny(), torch.ones(1, 3, dtype=torch.long), 5, cache="kv9")


@pytest.mark.usefixtures("stand_in")
def test_a_captured_step_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cq.fuse_attention(tiny())
    cache, seen = make(model, "kv8"), []
    ids = torch.randint(97, (1, 40))
    model(ids[:, :30], **as_argument(cache))
    monkeypatch.setattr(fused_attention, "_capturing", lambda: True)
    plain = fused_attention._starts
    monkeypatch.setattr(fused_attention, "_starts", lambda mask, view: seen.append(mask) or plain(mask, view))
    model(ids[:, 30:31], position_ids=cache.position_ids(1), **as_argument(cache))
    assert seen == [None] * len(cache.layers)
    padded = torch.ones(1, 32, dtype=torch.long)
    padded[0, 0] = 0
    with pytest.raises(cq.CanopyError, match="captured step takes no attention mask"):
        model(ids[:, 31:32], attention_mask=padded, **as_argument(cache))


def test_bytes_do_not_grow() -> None:
    model = tiny()
    cache = make(model, "kv8", capacity=4096)
    full = 2 * 2 * 2 * 4096 * 64 * 2  # keys and values, layers, heads, tokens, channels, two bytes each
    assert cache.nbytes < 0.6 * full and cache.nbytes == sum(x.nbytes for layer in cache.layers for x in layer.tensors)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("format", FORMATS)
@torch.inference_mode()
def test_a_captured_step_is_replayed_token_by_token(format: str, head_dim: int) -> None:
    model = cq.fuse_attention(tiny(head_dim).to("cuda", torch.float16), format)
    ids = torch.randint(97, (1, 250), device="cuda")
    growing, fixed = cq.QuantizedCache(model.config, format), make(model, format)
    passes = (100, *[1] * 150)
    expected = passes_of(model, ids, growing, passes)
    found = [passes_of(model, ids[:, :102], fixed, (100, 1, 1))]
    token = ids[:, 102:103].clone()

    def step() -> Tensor:
        given = {"position_ids": fixed.position_ids(1), "use_cache": True, **as_argument(fixed)}
        return model(token, **given).logits[:, -1]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for i in range(102, 250):
        token.copy_(ids[:, i : i + 1])
        graph.replay()
        found.append(out.clone()[None])
    assert fixed.synchronize() == 250 == fixed.get_seq_length()
    wide = tiny(head_dim)
    exact = passes_of(wide, ids.cpu(), cq.QuantizedCache(wide.config, format), passes)
    assert (torch.cat(found) - expected).float().norm() < 0.5 * (expected.float().cpu() - exact).norm()
    count = growing.layers[0].quantized_keys.tokens
    held = growing.layers[0].quantized_keys.tensors
    for a, b in zip(fixed.layers[0].quantized_keys.narrow(0, count).tensors, held, strict=True):
        same = a.view(torch.uint8) == b.view(torch.uint8)  # of the first layer, whose input is the same
        assert same.float().mean() > 0.99


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 3])
def test_fast_generate_replays_a_graph_over_codes(format: str, batch: int) -> None:
    model = tiny(128).to("cuda", torch.bfloat16)
    model.generation_config.eos_token_id = None
    ids = torch.randint(97, (batch, 70), device="cuda")
    decoder = Decoder(model, batch, 300, format)
    for start in (70, 9):
        found = decoder.generate(ids[:, :start], 200)
        assert decoder.graph is not None and decoder.cache.synchronize() == start + 199
        codes = cq.QuantizedCache(model.config, format)
        with torch.inference_mode():
            exact = model(found[:, :-1]).logits[:, -1].float()
            model(found[:, :start], **as_argument(codes), use_cache=True)
            for i in range(start, start + 199):
                logits = model(found[:, i : i + 1], **as_argument(codes), use_cache=True).logits[:, -1].float()
        # Rounded to bfloat16 at other places, some numbers get the neighbouring code: less than codes cost altogether.
        assert (decoder.logits.float() - logits).norm() < 0.1 * exact.norm() + (logits - exact).norm()
        assert (decoder.logits.float() - exact).norm() < 1.5 * (logits - exact).norm() + 0.1 * exact.norm()
