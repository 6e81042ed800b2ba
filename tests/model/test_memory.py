"""Bytes: parameter counts against published totals, the arithmetic against tensors that were really quantized."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from canopyq.errors import CanopyError
from canopyq.memory import (
    MODEL_SHAPES,
    ModelShape,
    WeightBytes,
    bytes_held,
    cache_bytes,
    human,
    model_bytes,
    parameter_count,
    tensors_held,
    weight_bytes,
)
from canopyq.model.quantize import plan, quantize_
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tensor.scheme import Recipe

PUBLISHED = {
    "tutor": 8_196_352,
    "qwen2.5-0.5b": 494_032_768,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "llama-2-70b": 68_976_648_192,
}


# Parameters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_parameters_equal_the_published_total(name: str) -> None:
    assert MODEL_SHAPES[name].parameters == PUBLISHED[name]
    assert parameter_count(name.upper()) == PUBLISHED[name]


@pytest.mark.parametrize(("tied", "family"), [(True, "qwen2"), (False, "llama")], ids=["tied qwen2", "untied llama"])
def test_parameters_equal_a_model_that_transformers_builds(tied: bool, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = ModelShape(64, 2, 4, 2, 16, 96, 100, tied=tied, qkv_bias=family == "qwen2")
    config = AutoConfig.for_model(
        family, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=100, tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    blocks = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert shape.linear_parameters == sum(m.weight.numel() for m in blocks)


@pytest.mark.parametrize(
    ("text", "count"),
    [("7B", 7e9), ("7b", 7e9), ("350M", 350e6), ("1.5b", 1.5e9), ("70k", 70e3), ("1T", 1e12), ("7e9", 7e9),
     ("7_000_000_000", 7e9), (7_000_000_000, 7e9), (7e9, 7e9), ("1", 1), ("1e15", 1e15)],
    ids=str,
)  # fmt: skip
def test_counts_as_people_write_them(text: str | int | float, count: float) -> None:
    result = parameter_count(text)
    assert result == count and isinstance(result, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama-2-7", "did you mean 'llama-2-7b'"),
        ("7 B", "or a count such as 7B or 350M"),
        ("-7B", "unknown model size '-7B'"),
        ("", "unknown model size ''"),
        (None, "unknown model size None"),
        (float("nan"), "unknown model size nan"),
        (float("inf"), "unknown model size inf"),
        ("7GB", "unknown model size '7GB'"),
        ("0", "not one to size"),
        (0.2, "not one to size"),
        ("7e99", "not one to size"),
        ("2e15", "not one to size"),
    ],
)
def test_what_is_no_count(text: object, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        parameter_count(text)  # type: ignore[arg-type]


# Weight bytes ---------------------------------------------------------------------------------------------------------


def test_7b_in_int4_g128_by_hand() -> None:
    result = weight_bytes(7e9, "int4", 128)
    assert result == WeightBytes(3.5e9, 109.375e6) and result.total == 3.609375e9
    assert weight_bytes(7e9, "int4", 128, symmetric=False).zero_points == 27_343_750


@pytest.mark.parametrize(
    ("name", "group", "bits"),
    [("fp32", None, 32), ("bf16", None, 16), ("int8", None, 8), ("int4", None, 4), ("int4", 32, 4.5),
     ("int3", 128, 3.125), ("nf4", None, 4.25), ("nf4", 32, 4.5), ("mxfp4", None, 4.25), ("mxfp4", 32, 4.25),
     ("nvfp4", None, 4.5)],
)  # fmt: skip
def test_bits_per_weight(name: str, group: int | None, bits: float) -> None:
    assert 8 * weight_bytes(1e6, name, group).total / 1e6 == bits


@pytest.mark.parametrize(
    ("name", "group", "dtype"),
    [("int8", 128, torch.bfloat16), ("int4", 128, torch.bfloat16), ("int4", 32, torch.float32),
     ("int3", 64, torch.float16), ("nf4", 64, torch.bfloat16), ("mxfp4", 32, None), ("nvfp4", 16, None),
     ("bf16", None, None), ("fp8", 128, torch.float16)],
)  # fmt: skip
def test_the_arithmetic_equals_a_tensor_that_was_quantized(
    name: str, group: int | None, dtype: torch.dtype | None
) -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    q = quantize(x, name, f"g{group}" if group else None, scale_dtype=dtype)
    predicted = weight_bytes(x.numel(), name, group, scale_bits=8 * dtype.itemsize if dtype else 16)
    global_scale = 4 if name == "nvfp4" else 0  # one number per tensor, left out of the arithmetic
    assert q.nbytes == predicted.total + global_scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7e9, "int44"), "did you mean 'int4'"),
        ((7e9, "mxfp4", 64), "fixes its blocks at 32"),
        ((7e9, "bf16", 128), "plain cast without scales"),
    ],
    ids=str,
)
def test_arithmetic_that_makes_no_sense(arguments: tuple, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        weight_bytes(*arguments)


@pytest.mark.parametrize("name", ["fp8", "nf4", "mxfp4", "nvfp4", "bf16"])
def test_only_integers_have_zero_points(name: str) -> None:
    with pytest.raises(CanopyError, match="has no zero point; leave asymmetric out"):
        weight_bytes(7e9, name, symmetric=False)


# What a model holds ---------------------------------------------------------------------------------------------------


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        base = torch.zeros(10, 4)
        self.top, self.bottom = nn.Parameter(base[:5]), nn.Parameter(base[5:])
        self.register_buffer("own", torch.zeros(3, dtype=torch.int8))
        self.register_buffer("fleeting", torch.zeros(2), persistent=False)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("none", None)


def test_views_into_one_storage_count_once() -> None:
    model = Views()
    assert list(tensors_held(model)) == ["top", "own", "fleeting"]
    assert bytes_held(model) == 10 * 4 * 4 + 3 + 2 * 4


def test_tied_weights_count_once() -> None:
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    assert bytes_held(nn.Sequential(embedding, head)) == 2 * 160
    head.weight = embedding.weight
    assert bytes_held(nn.Sequential(embedding, head)) == 160


def test_meta_tensors_hold_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(8, 8, device="meta"), nn.Linear(2, 2, bias=False))
    assert bytes_held(model) == 16


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (999_400, "999 kB"), (999_600, "1 MB"),
     (999.6e6, "1 GB"), (109.375e6, "109 MB"), (13_476_831_232, "13.5 GB"), (140e9, "140 GB"), (2.5e12, "2.5 TB"),
     (1e15, "1000 TB"), (-5e9, "-5 GB")],
)  # fmt: skip
def test_sizes_for_people(count: float, text: str) -> None:
    assert human(count) == text


# Whole models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "recipe",
    [None, "w8a16", "w4a16-g32-asym", "w3a16-channel", "w4a16-tensor", "fp8", "nvfp4", "w4a16-g32+head",
     "w4a16-g32+embed", "w8a16+head+embed"],
)  # fmt: skip
def test_model_bytes_are_what_a_quantized_model_holds(recipe: str | None, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=96, vocab_size=100, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    shape = ModelShape.of(config)
    assert shape == ModelShape(64, 2, 4, 2, 16, 96, 100, tied=tied)
    parsed = None if recipe is None else Recipe.parse(recipe)
    if parsed is not None:
        quantize_(model, parsed)
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name)
    assert model_bytes(shape, parsed).total == bytes_held(model) - rotary


def test_model_bytes_are_what_a_plan_of_7b_finds() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name)
    recipe = Recipe.parse("w4a16-g128")
    found = model_bytes(MODEL_SHAPES["llama-2-7b"], recipe)
    assert found.total == plan(model, recipe).bytes_after - rotary
    assert found.codes == MODEL_SHAPES["llama-2-7b"].linear_parameters // 2 and found.zero_points == 0


def test_model_bytes_follow_the_exceptions_of_a_recipe() -> None:
    from dataclasses import replace

    four, shape = Recipe.parse("w4a16-g128"), MODEL_SHAPES["tutor"]
    mixed = replace(four, exceptions=(("down_proj", Recipe.parse("w8a16-g128").weights),))
    more = model_bytes(shape, mixed).total - model_bytes(shape, four).total
    assert more == shape.layers * shape.hidden * shape.ffn // 2


def test_a_group_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CanopyError, match="group size 512 does not fit"):
        model_bytes(MODEL_SHAPES["tutor"], Recipe.parse("w4a16-g512"))


# The KV cache ---------------------------------------------------------------------------------------------------------


def test_cache_of_llama_2_7b_by_hand() -> None:
    shape = MODEL_SHAPES["llama-2-7b"]
    per_token = 2 * 32 * 32 * 128 * 2
    assert cache_bytes(shape, 1) == per_token == 524_288
    assert cache_bytes(shape, 4096, 3) == 3 * 4096 * per_token
    assert cache_bytes(MODEL_SHAPES["mistral-7b"], 4096) == cache_bytes(shape, 4096) // 4
    assert cache_bytes(shape, 4096, 1, "kv4") == 64 * per_token + 4032 * per_token * 4.5 / 16
    with pytest.raises(CanopyError, match="unknown KV cache 'kv3'"):
        cache_bytes(shape, 64, 1, "kv3")


@pytest.mark.parametrize("format", ["kv8", "kv4", "kv2", "kv-fp8"])
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 200), (128, 128), (32, 63), (16, 64)])
def test_cache_bytes_are_what_a_cache_holds(format: str, head_dim: int, tokens: int) -> None:
    from transformers import LlamaConfig

    from canopyq.kv_cache import QuantizedCache

    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         head_dim=head_dim, intermediate_size=96, vocab_size=100)  # fmt: skip
    cache = QuantizedCache(config, format)
    for layer in range(2):
        keys, values = torch.randn(2, 3, 2, tokens, head_dim, generator=torch.Generator().manual_seed(layer)).bfloat16()
        cache.update(keys, values, layer)
    assert cache.nbytes == cache_bytes(ModelShape.of(config), tokens, 3, format)
