"""Schemes and recipes: what their names mean, and which combinations make no sense."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from canopyq.errors import CanopyError
from canopyq.tensor.formats import FORMATS, get_format
from canopyq.tensor.granularity import Granularity
from canopyq.tensor.scheme import RECIPES, Recipe, Scheme


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (Scheme(), "int8 tensor symmetric"),
        (Scheme("int4", "g128"), "int4 g128 symmetric"),
        (Scheme("int4", "channel", restricted=True), "int4 channel restricted"),
        (Scheme("INT4", "token", symmetric=False), "int4 token asymmetric"),
        (Scheme("int8", observer="mse"), "int8 tensor symmetric mse"),
        (Scheme("fp8"), "fp8_e4m3 tensor"),
        (Scheme("nf4"), "nf4 g64"),
        (Scheme("nf4", "g32"), "nf4 g32"),
        (Scheme("mxfp4"), "mxfp4 g32"),
        (Scheme("nvfp4"), "nvfp4 g16"),
        (Scheme("bf16"), "bf16"),
    ],
    ids=str,
)
def test_schemes_read_back_as_words(scheme: Scheme, text: str) -> None:
    assert str(scheme) == text


def test_names_become_what_they_stand_for() -> None:
    scheme = Scheme("fp8", "channel")
    assert scheme.format is get_format("fp8_e4m3") and scheme.granularity == Granularity("channel")
    assert scheme == Scheme(get_format("fp8_e4m3"), Granularity("channel"))


def test_schemes_and_recipes_are_values() -> None:
    scheme, recipe = Scheme("int4", "g64"), Recipe.parse("nf4")
    assert hash(scheme) == hash(Scheme("int4", "g64")) and scheme != Scheme("int4", "g32")
    assert hash(recipe) == hash(Recipe.parse("NF4")) and recipe == Recipe.parse("nf4")
    for frozen, field in ((scheme, "symmetric"), (recipe, "name")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, field, None)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_scheme_of_its_own(name: str) -> None:
    assert Scheme(name).format.name == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int44"}, "did you mean 'int4'"),
        ({"observer": "minmx"}, "did you mean 'minmax'"),
        ({"format": "int4", "symmetric": False, "restricted": True}, "restricted range is a choice of symmetric"),
        ({"format": "fp8", "restricted": True}, "restricted range is a choice of symmetric"),
        ({"format": "fp8", "symmetric": False}, "no zero point; use symmetric=True"),
        ({"format": "nf4", "symmetric": False}, "no zero point; use symmetric=True"),
        ({"format": "bf16", "symmetric": False}, "no zero point; use symmetric=True"),
        ({"format": "mxfp4", "granularity": "g16"}, "fixes its blocks at 32 values; leave granularity out"),
        ({"format": "nvfp4", "granularity": "channel"}, "fixes its blocks at 16 values; leave granularity out"),
        ({"format": "mxfp4", "observer": "mse"}, "use observer='minmax'"),
        ({"format": "bf16", "granularity": "channel"}, "plain cast; leave granularity and observer out"),
        ({"format": "fp16", "observer": "mse"}, "plain cast; leave granularity and observer out"),
        ({"format": "nvfp4", "scale_dtype": torch.float16}, "leaves no choice of scales; leave scale_dtype out"),
        ({"format": "bf16", "scale_dtype": torch.float32}, "leaves no choice of scales; leave scale_dtype out"),
        ({"scale_dtype": torch.float64}, "scale_dtype=torch.float64"),
    ],
    ids=str,
)  # fmt: skip
def test_combinations_without_sense_say_why(arguments: dict, message: str) -> None:
    with pytest.raises(CanopyError, match=message) as caught:
        Scheme(**arguments)
    assert "\n" not in str(caught.value)


def test_block_formats_accept_their_own_block_size() -> None:
    assert Scheme("mxfp4", "g32") == Scheme("mxfp4")


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_listed_recipe_parses_to_its_name(name: str) -> None:
    recipe = Recipe.parse(name)
    assert recipe.name == name and Recipe.parse(recipe) is recipe


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("w4a16", "int4 g128 symmetric"),
        ("w8a16", "int8 channel symmetric"),
        ("w8a16-g64", "int8 g64 symmetric"),
        ("W4A16-G32-ASYM", "int4 g32 asymmetric"),
        ("w4a16-asym", "int4 g128 asymmetric"),
        ("w5a16-tensor", "int5 tensor symmetric"),
        ("w3a16-channel", "int3 channel symmetric"),
        ("nf4", "nf4 g64"),
        ("mxfp4", "mxfp4 g32"),
        ("nvfp4", "nvfp4 g16"),
    ],
)
def test_recipe_names(name: str, scheme: str) -> None:
    assert str(Recipe.parse(name).weights) == scheme


@pytest.mark.parametrize(
    ("name", "dtype"), [("w4a16-g128", torch.bfloat16), ("nf4", torch.bfloat16), ("mxfp4", None), ("nvfp4", None)]
)
def test_recipes_keep_scales_in_bfloat16_unless_the_format_brings_its_own(name: str, dtype: torch.dtype | None) -> None:
    assert Recipe.parse(name).weights.scale_dtype == dtype


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a16-g12 8", "did you mean 'w4a16-g128'"),
        ("w4a9", "unknown recipe 'w4a9'"),
        ("w8a8-statik", "did you mean 'w8a8-static'"),
        ("w8a8-asym-static", "unknown recipe 'w8a8-asym-static'; did you mean"),
        ("fp8-asym", "unknown recipe 'fp8-asym'"),
        ("w9a16", "did you mean 'w8a16'"),
        ("w1a16", "unknown recipe 'w1a16'"),
        ("nf5", "did you mean 'nf4'"),
        ("w4a16-g0", "unknown recipe 'w4a16-g0'"),
        ("", "unknown recipe ''"),
        (None, "unknown recipe None"),
    ],
)
def test_unknown_recipes_suggest_the_nearest(name: object, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        Recipe.parse(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "weights", "inputs", "static"),
    [
        ("w8a8", "int8 channel symmetric", "int8 token symmetric", False),
        ("w8a8-asym", "int8 channel symmetric", "int8 token asymmetric", False),
        ("w8a8-static", "int8 channel symmetric", "int8 tensor symmetric percentile", True),
        ("w8a8-static-asym", "int8 channel symmetric", "int8 tensor asymmetric percentile", True),
        ("w4a4", "int4 g128 symmetric", "int4 token symmetric", False),
        ("w4a8-channel", "int4 channel symmetric", "int8 token symmetric", False),
        ("w3a6-g64-static", "int3 g64 symmetric", "int6 tensor symmetric percentile", True),
        ("fp8", "fp8_e4m3 channel", "fp8_e4m3 token", False),
        ("fp8-static", "fp8_e4m3 channel", "fp8_e4m3 tensor", True),
    ],
)
def test_recipes_of_activations(name: str, weights: str, inputs: str, static: bool) -> None:
    recipe = Recipe.parse(name)
    assert (str(recipe.weights), str(recipe.activations), recipe.static) == (weights, inputs, static)
    assert recipe.weights.scale_dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "static"), [("mxfp4", False), ("nvfp4", True)])
def test_recipes_of_fp4_activations(name: str, static: bool) -> None:
    """Of NVFP4 the global scale is fixed beforehand; MXFP4 has none."""
    recipe = Recipe.parse(f"{name}-w4a4")
    assert recipe.weights == recipe.activations == Scheme(name) and recipe.static is static
    if static:
        with pytest.raises(CanopyError, match="nvfp4.*static=True"):
            Recipe("mine", Scheme(name), activations=Scheme(name))


@pytest.mark.parametrize("inputs", [None, Scheme("int8", "token"), Scheme("int8", "g32")], ids=str)
def test_a_static_range_is_one_for_all_tokens(inputs: Scheme | None) -> None:
    with pytest.raises(CanopyError, match="static activations have one scale for all tokens"):
        Recipe("mine", Scheme("int8"), activations=inputs, static=True)


@pytest.mark.parametrize(
    ("name", "weights", "cache"),
    [
        ("w4a16-g128+kv4", "int4 g128 symmetric", "kv4"),
        ("w8a8+head+kv-fp8", "int8 channel symmetric", "kv-fp8"),
        ("nf4+kv2+embed", "nf4 g64", "kv2"),
        ("KV8", "None", "kv8"),
        ("kv-fp8", "None", "kv-fp8"),
    ],
)
def test_recipes_with_a_cache(name: str, weights: str, cache: str) -> None:
    recipe = Recipe.parse(name)
    assert (recipe.name, str(recipe.weights), recipe.cache) == (name.lower(), weights, cache)
    assert Recipe.parse("w4a16").cache is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a16+kv3", r"unknown addition to w4a16 '\+kv3'; did you mean '\+kv8'"),
        ("w4a16+kv4+kv8", r"names 2 caches; a model has one: keep \+kv4"),
        ("kv4+head", r"unknown addition to kv4 '\+head'"),
        ("kv4+kv8", r"unknown addition to kv4 '\+kv8'"),
    ],
)
def test_caches_that_do_not_exist_or_fit(name: str, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        Recipe.parse(name)


def test_a_recipe_of_the_cache_alone_quantizes_no_weights() -> None:
    assert Recipe.of_weights("w4a16+kv4").cache == "kv4"
    with pytest.raises(
        CanopyError, match=r"kv4 leaves the weights as they are: .*QuantizedCache\(model.config, 'kv4'\)"
    ):
        Recipe.of_weights("kv4")
    with pytest.raises(CanopyError, match="unknown KV cache 'kv5'"):
        Recipe("mine", Scheme("int4"), cache="kv5")


@pytest.mark.parametrize(
    ("ignore", "module", "ignored"),
    [
        (("lm_head",), "lm_head", True),
        (("lm_head",), "model.lm_head", True),
        (("lm_head",), "head", False),
        (("lm_head",), "", False),
        (("head",), "lm_head", False),
        ("lm_head", "head", False),
        ("lm_head", "lm_head", True),
        (["q_proj"], "model.layers.0.self_attn.q_proj", True),
        (("mlp",), "model.layers.0.mlp.up_proj", True),
        (("layers.1",), "model.layers.1.mlp.up_proj", True),
        (("layers.1",), "model.layers.11.mlp.up_proj", False),
        (("mlp.down_proj",), "model.layers.0.mlp.down_proj", True),
        ((), "lm_head", False),
    ],
    ids=str,
)
def test_ignored_modules(ignore: object, module: str, ignored: bool) -> None:
    assert Recipe("mine", Scheme("int4"), ignore=ignore).ignores(module) is ignored  # type: ignore[arg-type]


def test_additions_named_twice_count_once() -> None:
    assert Recipe.parse("w4a16+head+head+kv4") == Recipe.parse("w4a16+head+kv4")
