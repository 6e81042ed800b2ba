"""``quantization_config``: written so that compressed-tensors reads it, read whoever wrote it, never guessed at."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopyq.checkpoint.config import Group, Quantization, read_config, write_config
from canopyq.checkpoint.groups import Layer, grouped
from canopyq.checkpoint.layout import FLOAT, INT, MXFP4, PACKED
from canopyq.errors import CanopyError
from canopyq.nn.kinds import Linear
from canopyq.tensor.scheme import Recipe, Scheme

RECIPES = ["w4a16-g128", "w4a16-g32", "w4a16-channel", "w4a16-g64-asym", "w8a16", "w8a16-g32-asym", "w2a16-g32",
           "w4a16-tensor", "w8a8", "w8a8-static", "w8a8-asym", "w8a8-static-asym", "w4a8-g32", "w4a4-g128", "fp8",
           "fp8-static", "nvfp4", "mxfp4", "nvfp4-w4a4", "mxfp4-w4a4"]  # fmt: skip
PLAIN = {  # the shortest form that transformers loads
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}}},
}  # fmt: skip


FOUR = {"num_bits": 4, "type": "float", "group_size": 16}


def changed(**changes: object) -> dict:
    """The short form with changes: a key of the whole, or ``group__key``, or ``weights__key``."""
    config = json.loads(json.dumps(PLAIN))
    for path, value in changes.items():
        *where, key = path.split("__")
        target = config
        if where:
            target = config["config_groups"]["group_0"]
            target = target["weights"] if where == ["weights"] else target
        target[key] = value
    return config


def quantization_config(recipe: Recipe, ignore: list[str]) -> dict:
    """Of a model in which all linear layers but the ignored ones are quantized."""
    layer = Layer("model.layers.0.mlp.up_proj", Linear(), recipe.weights, recipe.activations, recipe.static)
    return write_config(grouped([layer]), ignore)


@pytest.mark.parametrize("name", RECIPES)
def test_there_and_back(name: str) -> None:
    recipe = Recipe.parse(name)
    (group,) = read_config(json.loads(json.dumps(quantization_config(recipe, ["lm_head"])))).groups
    assert group.static is recipe.static
    for ours, other in [(group.weights, recipe.weights), (group.activations, recipe.activations)]:
        assert (ours is None) == (other is None)
        if ours is not None:
            assert (ours.format, ours.granularity, ours.symmetric) == (other.format, other.granularity, other.symmetric)


def test_the_full_form_is_that_of_compressed_tensors() -> None:
    assert quantization_config(Recipe.parse("w4a16-g128"), ["lm_head"]) == {
        "config_groups": {"group_0": {
            "format": "pack-quantized", "input_activations": None, "output_activations": None, "targets": ["Linear"],
            "weights": {"dynamic": False, "group_size": 128, "num_bits": 4, "strategy": "group", "symmetric": True,
                        "type": "int"}}},
        "format": "pack-quantized", "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "moe_sparsity_config": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "sparsity_config": {}, "transform_config": {}, "version": "0.20.0",
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_compressed_tensors_understands_it(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    recipe = Recipe.parse(name)
    written = quantization_config(recipe, ["lm_head"])
    theirs = QuantizationConfig.model_validate(written).config_groups["group_0"]
    weights = theirs.weights
    assert (weights.num_bits, weights.symmetric) == (recipe.weights.format.bits, recipe.weights.symmetric)
    assert weights.strategy == ("tensor_group" if "nvfp4" in name else recipe.weights.granularity.kind)
    assert weights.scale_dtype == recipe.weights.format.scale_dtype
    assert weights.group_size == recipe.weights.granularity.group_size
    assert (theirs.input_activations is None) == (recipe.activations is None)
    if theirs.input_activations is not None:
        inputs = theirs.input_activations
        kinds = ("tensor" if recipe.static else "token", not recipe.static)
        kinds = {"nvfp4-w4a4": ("tensor_group", "local"), "mxfp4-w4a4": ("group", True)}.get(name, kinds)
        assert (inputs.strategy, inputs.dynamic) == kinds
        assert (inputs.num_bits, inputs.symmetric) == (recipe.activations.format.bits, recipe.activations.symmetric)


def test_the_short_form_and_older_spellings() -> None:
    (group,) = read_config(PLAIN).groups
    assert group == Group("group_0", ("Linear",), Scheme("int4", "g128"), None, PACKED)
    weights = PLAIN["config_groups"]["group_0"]["weights"]
    assert read_config(changed(weights__observer="minmax", weights__block_structure=None)).groups == (group,)
    for size, kind in [(-1, "channel"), (None, "tensor"), (128, "g128")]:  # without a strategy the size tells
        spelled = {key: value for key, value in weights.items() if key != "strategy"} | {"group_size": size}
        (read,) = read_config(changed(group__weights=spelled)).groups
        assert read.weights == Scheme("int4", kind)
    eight = weights | {"num_bits": 8, "strategy": "channel", "group_size": None}
    assert read_config(changed(format="naive-quantized", group__weights=eight)).groups[0].format == INT
    four = weights | {"type": "float", "group_size": 32}  # as compressed-tensors wrote it before scales had a dtype
    assert read_config(changed(format=MXFP4, group__weights=four)).groups[0].weights == Scheme("mxfp4")
    float8 = eight | {"type": "float"}
    assert read_config(changed(format="naive-quantized", group__weights=float8)).groups[0].format == FLOAT


# Which group a layer belongs to ---------------------------------------------------------------------------------------


def test_the_most_specific_target_wins_and_ignore_wins_over_all() -> None:
    def group(name: str, *targets: str) -> Group:
        return Group(name, targets, Scheme("int4", "g32"), None, PACKED)

    groups = (group("class", "Linear"), group("pattern", r"re:.*down_proj$"), group("name", "layers.1.mlp.down_proj"))
    quantization = Quantization(groups, ("lm_head", r"re:layers\.2\..*"))
    found = {
        name: (group := quantization.group_of(name)) and group.name
        for name in ["layers.0.q_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "layers.2.mlp.down_proj",
                     "lm_head"]
    }  # fmt: skip
    assert list(found.values()) == ["class", "pattern", "name", None, None]
    assert quantization.group_of("layers.0.conv", kind="Conv1d") is None


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        ([["Linear"]], ["lm_head"]),
        ([["Linear"], ["re:.*mlp.*"]], ["lm_head", "re:.*k_proj"]),
        ([["re:.*q_proj", "model.layers.1.mlp.up_proj"], ["re:.*mlp.*"]], []),
        ([["Linear"], ["re:.*layers.1.*"], ["re:.*mlp.*"]], ["Embedding"]),
    ],
    ids=str,
)
def test_the_same_layers_as_compressed_tensors(targets: list, ignore: list, llama: Callable) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    sizes = [16, 32, 8]
    groups = [Group(f"group_{i}", tuple(own), Scheme("int4", f"g{sizes[i]}"), None, PACKED)
              for i, own in enumerate(targets)]  # fmt: skip
    written = write_config(groups, ignore) | {"quantization_status": "frozen"}
    model = llama()
    apply_quantization_config(model, QuantizationConfig.model_validate(written))
    quantization = read_config(written)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            scheme, ours = getattr(module, "quantization_scheme", None), quantization.group_of(name)
            theirs = None if scheme is None else scheme.weights.group_size
            assert theirs == (None if ours is None else ours.weights.granularity.group_size), name


# What is not read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (changed(quant_method="gptq"), "quant_method 'gptq' is not read"),
        (changed(format="pack-quantised"), "unknown format 'pack-quantised'; did you mean 'pack-quantized'"),
        (changed(format=None), "unknown format None"),
        (changed(format=["pack-quantized"]), "unknown format"),
        (changed(format="marlin-24"), "format 'marlin-24' of group_0 is not read yet"),
        (changed(format="int-quantized"), "does not hold int4 weights"),
        (changed(format="mxfp4-pack-quantized"), "does not hold int4 weights"),
        (changed(weights__num_bits=16), "does not hold|int16"),
        (changed(weights__num_bits="4"), "num_bits '4'"),
        (changed(weights__num_bits=True), "num_bits True"),
        (changed(weights__num_bits=4.0), "num_bits 4.0"),
        (changed(weights__type="complex"), "type 'complex'"),
        (changed(weights__type="float"), "FP4 with group_size 128, strategy 'group'"),
        (changed(weights__type="float", weights__num_bits=6), "floats of 6 bits"),
        (changed(weights__symmetric="yes"), "symmetric 'yes'"),
        (changed(weights__strategy="block"), "strategy 'block' of weights of group_0 is not read yet"),
        (changed(weights__strategy="attn_head"), "strategy 'attn_head'"),
        (changed(weights__group_size=0), "group_size 0"),
        (changed(weights__group_size=-5), "group_size -5"),
        (changed(weights__group_size=None), "group_size None"),
        (changed(weights__group_size=1.5), "group_size 1.5"),
        (changed(weights__dynamic=True), "marked dynamic"),
        (changed(group__input_activations={"num_bits": 8, "dynamic": "local"}), "are dynamic 'local'"),
        (changed(group__input_activations={"num_bits": 8, "strategy": "token"}), "'token' of input_.*; tensor"),
        (changed(group__input_activations=FOUR | {"strategy": "tensor_group", "dynamic": True}), "are dynamic True"),
        (changed(group__input_activations=FOUR | {"strategy": "tensor_group"}), "are dynamic None"),
        (changed(group__input_activations=FOUR | {"strategy": "group", "group_size": 32}), "mxfp4 with fixed scales"),
        (changed(group__input_activations=FOUR | {"strategy": "group", "dynamic": "local"}), "are dynamic 'local'"),
        (changed(group__input_activations={"num_bits": 8, "strategy": "channel", "dynamic": True}), "tensor, group, t"),
        (changed(weights__actorder="group"), "needs a g_idx"),
        (changed(weights__colour="blue"), "'colour' in weights of group_0 is not understood"),
        (changed(group__colour="blue"), "'colour' in group_0 is not understood"),
        (changed(group__weights=None), "quantizes no weights"),
        (changed(group__targets="Linear"), "has to be a list of names"),
        (changed(group__targets=[3]), "has to be a list of names"),
        (changed(group__targets=["re:("]), "no regular expression"),
        (changed(ignore="lm_head"), "ignore has to be a list of names"),
        (changed(ignore=["re:[z-a]"]), "no regular expression"),
        (changed(group__output_activations={"num_bits": 8}), "output_activations"),
        (changed(config_groups={}), "config_groups is empty"),
        (changed(config_groups=[PLAIN]), "config_groups has to be an object"),
        (changed(config_groups={"group_0": 3}), "group_0 has to be an object"),
        (changed(quantization_status="initialized"), "never compressed"),
        (changed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (changed(transform_config={"config_groups": {"a": 1}}), "transform_config"),
        (changed(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (changed(sparsity_config=[1]), "sparsity_config has to be an object"),
        ([PLAIN], "quantization_config has to be an object"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_configs_that_are_refused(config: object, part: str) -> None:
    with pytest.raises(CanopyError, match=part) as refused:
        read_config(config)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_recipes_that_no_config_holds() -> None:
    with pytest.raises(CanopyError, match="nf4"):
        quantization_config(Recipe.parse("nf4"), [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**9) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["int", "float", "group", "channel", "tensor", "re:(", "re:a*", "Linear", "pack-quantized"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
KEYS = ["quant_method", "format", "quantization_status", "ignore", "config_groups", "kv_cache_scheme",
        "sparsity_config", "transform_config", "group__targets", "group__weights", "group__format",
        "group__input_activations", "weights__num_bits", "weights__type", "weights__symmetric", "weights__strategy",
        "weights__group_size", "weights__dynamic", "weights__actorder", "weights__zp_dtype", "weights__x"]  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3), name=st.text(max_size=20))
@settings(max_examples=150)
def test_wrong_json_is_refused_or_read(changes: dict, name: str) -> None:
    """Whatever stands there: a `CanopyError`, or groups that say of any name whether it is theirs."""
    ordered = dict(sorted(changes.items(), key=lambda item: item[0].count("__")))
    try:
        config = changed(**ordered)
    except (KeyError, TypeError, IndexError, AttributeError):  # a change that the next one cannot be made in
        return
    try:
        quantization = read_config(config)
    except CanopyError:
        return
    quantization.group_of(name)
