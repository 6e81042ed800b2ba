"""The quantized KV cache: append-only, really small, and right wherever transformers uses a cache."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
)
from transformers.utils import logging

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.kv_cache import QuantizedCache, as_argument
from canopyq.kv_cache.layers import QuantizedCacheLayer
from canopyq.tensor.formats import CACHE_FORMATS, get_cache_format

FORMATS = tuple(CACHE_FORMATS)
SLIDING = ["full_attention", "sliding_attention"]
logging.set_verbosity_error()


def config(**options) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 512, "pad_token_id": 0}
    return LlamaConfig(**sizes | {"eos_token_id": None} | options)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config()).eval().double()


def tokens(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 99, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model, cache, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, **as_argument(cache), use_cache=True).logits


def generate(model, ids: torch.Tensor, cache, n: int = 20, **options) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False} | options
    return model.generate(ids, **as_argument(cache), max_new_tokens=n, min_new_tokens=n, **options)


def held(cache: QuantizedCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in layer.tensors]


def same(a: QuantizedCache, b: QuantizedCache) -> bool:
    return len(held(a)) == len(held(b)) and all(torch.equal(x, y) for x, y in zip(held(a), held(b), strict=True))


@settings(max_examples=40)
@given(
    name=st.sampled_from(FORMATS), keys=st.sampled_from(["channel", "token"]), window=st.sampled_from([0, 5, 64, 100]),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_split_into_chunks_stores_the_same_bytes(name, keys, window, lengths, seed) -> None:
    x = torch.randn(2, 2, 1, sum(lengths), 16, generator=torch.Generator().manual_seed(seed))
    whole, parts = (QuantizedCacheLayer(get_cache_format(name), keys, 16, window) for _ in range(2))
    whole.update(x[0], x[1])
    for chunk in x.split(lengths, dim=3):
        parts.update(chunk[0], chunk[1])
    assert len(whole.tensors) == len(parts.tensors)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, parts.tensors, strict=True))
    assert window <= parts.keys.shape[2] < window + 64 or sum(lengths) < window


def test_what_is_quantized_once_is_never_touched_again() -> None:
    layer = QuantizedCacheLayer(get_cache_format("kv2"), "channel", 16, 0)
    x = torch.randn(2, 1, 1, 640, 16)
    layer.update(*x[..., :64, :])
    first = [tensor.clone() for tensor in layer.tensors]
    for start in range(64, 640, 32):
        seen, _ = layer.update(*x[..., start : start + 32, :])
    again = layer.quantized_keys.narrow(0, 64).tensors + layer.quantized_values.narrow(0, 64).tensors
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=False))
    assert torch.equal(seen[..., -32:, :], x[0, ..., -32:, :])  # new tokens are seen as they are


@pytest.mark.parametrize(("name", "limit"), [("kv8", 0.56), ("kv-fp8", 0.56), ("kv4", 0.32), ("kv2", 0.20)])
def test_bytes_of_the_tutor_at_4k_tokens(name: str, limit: float) -> None:
    shape = cq.tutor.load()[0].config
    sizes = {k: getattr(shape, k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    cache = QuantizedCache(config(**sizes, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096), name)
    in_bf16 = 2 * 8 * 2 * 64 * 2
    for start in range(0, 4096, 512):
        for layer in range(8):
            cache.update(*torch.randn(2, 1, 2, 512, 64, dtype=torch.bfloat16), layer)
        ratio = cache.nbytes / (in_bf16 * (start + 512))
    assert cache.get_seq_length() == 4096
    assert ratio <= limit
    assert cache.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in held(cache))  # and no slack


@pytest.mark.parametrize("name", FORMATS)
def test_generate_goes_through_the_cache(model, name: str) -> None:
    cache = QuantizedCache(model.config, name)
    ids = tokens(180)
    answer = generate(model, ids, cache, 60)
    assert cache.get_seq_length() == 239
    assert cache.layers[0].quantized_tokens == 192  # 32 of the other 47 would have been enough to keep
    if name == "kv8":
        assert torch.equal(answer, generate(model, ids, DynamicCache(config=model.config), 60))


def test_passes_of_one_block_see_what_generating_token_by_token_sees(model) -> None:
    ids = tokens(200)
    one = QuantizedCache(model.config, "kv2")
    by_token = torch.cat([feed(model, one, ids[:, i : i + 1]) for i in range(200)], 1)
    blocks, by_block, start = QuantizedCache(model.config, "kv2"), [], 0
    while start < 200:
        stop = start + blocks.tokens_until_flush
        by_block.append(feed(model, blocks, ids[:, start:stop]))
        start = stop
    torch.testing.assert_close(torch.cat(by_block, 1), by_token, rtol=1e-5, atol=1e-5)


def test_beam_search(model) -> None:
    ids = tokens(150)
    beams = {"num_beams": 3, "num_return_sequences": 3}
    expected = generate(model, ids, DynamicCache(config=model.config), 30, **beams)
    assert torch.equal(generate(model, ids, QuantizedCache(model.config, "kv8"), 30, **beams), expected)


def test_reorder_moves_whole_chats(model) -> None:
    cache = QuantizedCache(model.config, "kv4")
    feed(model, cache, tokens(100, batch=3))
    before = [tensor.clone() for tensor in held(cache)]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert all(torch.equal(a[[2, 0, 0]], b) for a, b in zip(before, held(cache), strict=True))
    cache.batch_select_indices(torch.tensor([1]))
    assert all(torch.equal(a[[0]], b) for a, b in zip(before, held(cache), strict=True))
    cache.batch_repeat_interleave(2)
    assert all(torch.equal(a[[0, 0]], b) for a, b in zip(before, held(cache), strict=True))


def test_a_batch_with_left_padding_answers_as_each_chat_alone(model) -> None:
    long, short = tokens(140, seed=1), tokens(90, seed=2)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 50, dtype=torch.long), short], 1)])
    mask = (ids != 0).long()
    both = generate(model, ids, QuantizedCache(model.config, "kv8"), attention_mask=mask)
    for row, alone in zip(both, (long, short), strict=True):
        expected = generate(model, alone, QuantizedCache(model.config, "kv8"))
        assert torch.equal(row[-20:], expected[0, -20:])


def test_crop_goes_back_exactly_where_it_can() -> None:
    x = torch.randn(2, 1, 2, 200, 16)
    layer = QuantizedCacheLayer(get_cache_format("kv4"), "channel", 16, 10)
    layer.update(x[0], x[1])
    assert layer.keys.shape[2] == 72
    for length, remove in ((195, -5), (140, -55), (128, -12), (64, 64), (0, -1000)):  # 64 keeps 64, as before 5.18
        layer.crop(remove)
        assert layer.get_seq_length() == length
        expected = QuantizedCacheLayer(get_cache_format("kv4"), "channel", 16, 10)
        expected.update(*x[:, :, :, :200])
        if length >= 128:
            expected.keys, expected.values = x[0, :, :, 128:length], x[1, :, :, 128:length]
            assert all(torch.equal(a, b) for a, b in zip(layer.tensors, expected.tensors, strict=True))
    assert layer.quantized_tokens == 0


def test_crop_inside_a_quantized_block_is_refused(model) -> None:
    cache = QuantizedCache(model.config, "kv4", residual_length=0)
    feed(model, cache, tokens(150))
    before = [tensor.clone() for tensor in held(cache)]
    with pytest.raises(CanopyError, match="crop to 64 and feed 36 again"):
        cache.crop(-50)
    assert all(torch.equal(a, b) for a, b in zip(before, held(cache), strict=True))


def test_speculative_decoding_can_go_back() -> None:
    """Drafts looked up in the prompt: transformers crops the rejected ones after every pass."""
    tutor, tokenizer = cq.tutor.load()
    [question] = cq.tutor.questions(1, skill="recall", fillers=8)
    start = cq.tutor.encode(tokenizer, question.turns)[1]
    ids = torch.tensor([cq.tutor.encode(tokenizer, question.turns)[0][:start]])
    cache, written = QuantizedCache(tutor.config, "kv8"), []
    crop = cache.crop
    cache.crop = lambda n: (written.append(n), crop(n))
    answer = generate(tutor, ids, cache, 40, prompt_lookup_num_tokens=9)
    assert torch.equal(answer, generate(tutor, ids, QuantizedCache(tutor.config, "kv8"), 40))
    assert min(written) < -1 and cache.layers[0].quantized_tokens >= 64


def test_chats_go_on_from_one_prefix(model) -> None:
    prefix = QuantizedCache(model.config, "kv4")
    feed(model, prefix, tokens(200))
    before = [tensor.clone() for tensor in held(prefix)]
    for seed, duplicate in ((1, prefix.copy()), (2, copy.deepcopy(prefix))):
        more = tokens(100, seed=seed)
        fresh = QuantizedCache(model.config, "kv4")
        feed(model, fresh, tokens(200))
        feed(model, fresh, more)
        feed(model, duplicate, more)
        assert same(duplicate, fresh)
    assert all(torch.equal(a, b) for a, b in zip(before, held(prefix), strict=True))
    assert prefix.copy().layers[0].quantized_keys is prefix.layers[0].quantized_keys


def test_reset_begins_anew(model) -> None:
    cache, fresh = QuantizedCache(model.config, "kv4"), QuantizedCache(model.config, "kv4")
    feed(model, cache, tokens(200))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    feed(model, cache, tokens(90, batch=2, seed=3))
    feed(model, fresh, tokens(90, batch=2, seed=3))
    assert same(cache, fresh)


@pytest.mark.parametrize(
    ("kind", "options", "shapes"),
    [
        (FalconConfig, {"multi_query": True}, [(1, 16)] * 3),
        (FalconConfig, {"new_decoder_architecture": True, "num_kv_heads": 2}, [(4, 16)] * 3),  # repeated before
        (
            Gemma4TextConfig,
            {"num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32},
            [(2, 16), (2, 16), (2, 32)],
        ),
    ],
    ids=["one KV head", "repeated", "heads of two sizes"],
)
def test_heads_of_other_models(kind, options: dict, shapes: list) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99}
    if kind is Gemma4TextConfig:
        sizes |= {"intermediate_size": 64, "vocab_size_per_layer_input": 99, "num_kv_shared_layers": 0}
    other = AutoModelForCausalLM.from_config(kind(**sizes | options)).eval()
    cache, ids = QuantizedCache(other.config, "kv8"), tokens(200)
    assert cache.shapes == shapes
    with torch.no_grad():
        expected = other(input_ids=ids, use_cache=False).logits
    logits = torch.cat([feed(other, cache, ids[:, :190]), feed(other, cache, ids[:, 190:])], 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.03)
    assert cache.layers[0].quantized_tokens == 128


@pytest.mark.parametrize("window", [40, 100, 1000])
def test_sliding_windows_see_what_they_should(window: int) -> None:
    torch.manual_seed(0)
    sizes = config().to_dict()
    keep = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    options = {k: sizes[k] for k in (*keep, "vocab_size", "max_position_embeddings", "pad_token_id", "eos_token_id")}
    sliding = AutoModelForCausalLM.from_config(MistralConfig(**options, sliding_window=window)).eval()
    ids = tokens(400)
    cache = QuantizedCache(sliding.config, "kv8")
    with torch.no_grad():
        expected = sliding(input_ids=ids, use_cache=False).logits
    logits = torch.cat(
        [feed(sliding, cache, ids[:, start:stop]) for start, stop in ((0, 250), (250, 260), (260, 400))], 1
    )
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.03)
    assert cache.get_seq_length() == 400
    assert cache.layers[0].get_mask_sizes(1)[0] <= window + 64 + 96
    answer = generate(sliding, ids, QuantizedCache(sliding.config, "kv8"))
    assert torch.equal(answer, generate(sliding, ids, DynamicCache(config=sliding.config)))


def test_a_sliding_window_cannot_go_back_behind_itself() -> None:
    torch.manual_seed(0)
    sliding = AutoModelForCausalLM.from_config(
        MistralConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                      num_key_value_heads=2, vocab_size=99, sliding_window=100)
    ).eval()  # fmt: skip
    cache = QuantizedCache(sliding.config, "kv8")
    feed(sliding, cache, tokens(400))
    with pytest.raises(CanopyError, match="sliding window has passed"):
        cache.crop(-200)


def test_all_layers_go_back_or_none() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99}
    both = AutoModelForCausalLM.from_config(Gemma3TextConfig(**sizes, sliding_window=100, layer_types=SLIDING)).eval()
    cache = QuantizedCache(both.config, "kv8")
    feed(both, cache, tokens(400))
    with pytest.raises(CanopyError, match="sliding window has passed"):
        cache.crop(-336)  # to 64, where a block begins: the first layer could
    assert [layer.get_seq_length() for layer in cache.layers] == [400, 400]


# Bad input: a clear error, and the cache as it was.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 24},
            "groups of 24 channels do not divide heads of 16; use one that does, such as group_size=16",
        ),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        QuantizedCache(config(), **options)


@pytest.mark.parametrize(("head_dim", "group_size"), [(80, 40), (96, 48), (256, 64), (24, 24)])
def test_a_head_that_64_does_not_divide_gets_the_largest_groups_that_do(head_dim: int, group_size: int) -> None:
    cache, x = QuantizedCache(config(head_dim=head_dim)), torch.randn(1, 2, 128, head_dim)
    for layer in range(3):
        cache.update(x, x, layer)
    assert cache.layers[0].quantized_values.group_size == group_size


def test_a_model_in_place_of_its_config(model) -> None:
    with pytest.raises(CanopyError, match="use model.config"):
        QuantizedCache(model)


def refused(model, cache: QuantizedCache, ids: torch.Tensor, message: str) -> None:
    """The pass fails with that message, and the cache is as it was."""
    before = [tensor.clone() for tensor in held(cache)]
    with pytest.raises(CanopyError, match=message):
        feed(model, cache, ids)
    assert len(before) == len(held(cache))
    assert all(torch.equal(a, b) for a, b in zip(before, held(cache), strict=True))


def test_more_tokens_than_the_context_holds(model) -> None:
    cache = QuantizedCache(model.config, "kv4")
    feed(model, cache, tokens(500))
    refused(model, cache, tokens(13), "513 tokens are more than the model's context of 512")
    feed(model, cache, tokens(12))
    assert cache.get_seq_length() == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_key_value_heads": 4}, "for 4 heads of 16, and got keys of 2 heads of 16"),
        ({"head_dim": 8}, "for 2 heads of 8, and got keys of 2 heads of 16"),
    ],
)
def test_a_cache_of_another_shape(model, options: dict, message: str) -> None:
    refused(model, QuantizedCache(config(**options)), tokens(100), message)


def test_a_cache_of_a_shallower_model_is_emptied(model) -> None:
    cache = QuantizedCache(config(num_hidden_layers=2))
    with pytest.raises(CanopyError, match="layer 2 .* 2 layers"):
        feed(model, cache, tokens(100))
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)


def test_a_cache_of_a_deeper_model_is_found_at_the_next_pass(model) -> None:
    cache = QuantizedCache(config(num_hidden_layers=5))
    feed(model, cache, tokens(100))
    with pytest.raises(CanopyError, match="reached 3 of the cache's 5 layers and was undone"):
        feed(model, cache, tokens(1))
    assert cache.get_seq_length() == 0


def test_another_batch_or_dtype(model) -> None:
    cache = QuantizedCache(model.config)
    feed(model, cache, tokens(70))
    refused(model, cache, tokens(5, batch=2), "holds 1 chats in torch.float64 on cpu, and got 2")
    refused(copy.deepcopy(model).to(torch.bfloat16), cache, tokens(5), "and got 1 in torch.bfloat16")


def test_keys_that_are_not_finite_leave_nothing_behind(model) -> None:
    broken = copy.deepcopy(model)
    cache = QuantizedCache(model.config, "kv4")
    feed(model, cache, tokens(60))
    with torch.no_grad():
        broken.model.layers[2].self_attn.k_proj.weight[3] = torch.nan  # the last layer: two have stored theirs
    refused(broken, cache, tokens(40), "cannot be cached")
    feed(model, cache, tokens(40))
    assert cache.get_seq_length() == 100


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_leaves_nothing_behind(model, interrupt: type) -> None:
    cache = QuantizedCache(model.config, "kv4")
    feed(model, cache, tokens(100))
    before = [tensor.clone() for tensor in held(cache)]

    def stop(*_) -> None:
        raise interrupt

    uses = (
        lambda: feed(model, cache, tokens(3)), lambda: cache.crop(-1), cache.copy,
        lambda: cache.reorder_cache(torch.tensor([0])), lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    )  # fmt: skip
    for use in uses:
        hook = model.model.layers[1].mlp.register_forward_pre_hook(stop)
        with pytest.raises(interrupt):
            feed(model, cache, tokens(100, seed=1))
        hook.remove()
        assert cache.get_seq_length() == 100
        with pytest.raises(CanopyError, match="reached 2 of the cache's 3 layers and was undone"):
            use()
        assert all(torch.equal(a, b) for a, b in zip(before, held(cache), strict=True))
    fresh = QuantizedCache(model.config, "kv4")
    feed(model, fresh, tokens(100))
    assert torch.equal(feed(model, cache, tokens(100, seed=1)), feed(model, fresh, tokens(100, seed=1)))


def test_keys_and_values_that_do_not_go_together(model) -> None:
    x = torch.randn(1, 2, 5, 16)
    for keys, values, message in (
        (x[0], x[0], r"keys of a tensor \(2, 5, 16\)"),
        (x, x[:, :, :4], r"keys are torch.float32 \(1, 2, 5, 16\) on cpu and values torch.float32 \(1, 2, 4, 16\)"),
        (x, x.expand(3, 2, 5, 16), "takes both alike"),
        (x, x.half(), "takes both alike"),
        (x, x.to("meta"), "on meta; a cache takes both alike"),
        (x.int(), x.int(), "as floats"),
    ):
        cache = QuantizedCache(model.config)
        with pytest.raises(CanopyError, match=message):
            cache.update(keys, values, 0)
        assert cache.get_seq_length() == 0 and cache.nbytes == 0
    for layer in range(3):
        cache.update(x, x, layer)
    with pytest.raises(CanopyError, match="on cpu, and got 1 in torch.float32 on meta"):
        cache.update(x.to("meta"), x.to("meta"), 0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_batch_of_no_chats(model, name: str) -> None:
    cache = QuantizedCache(model.config, name, residual_length=0)
    for n in (100, 1, 30):
        for layer in range(3):
            seen = cache.update(torch.randn(0, 2, n, 16), torch.randn(0, 2, n, 16), layer)
    assert seen[0].shape == seen[1].shape == (0, 2, 131, 16)
    assert cache.get_seq_length() == 131 and cache.nbytes == 0


def test_transformers_takes_the_cache_without_a_warning(model) -> None:
    """Under the name that this release calls it by: the other one is refused, or warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        cache = QuantizedCache(model.config, "kv4")
        feed(model, cache, tokens(5))
        assert generate(model, tokens(9), cache, 2).shape == (1, 11)
