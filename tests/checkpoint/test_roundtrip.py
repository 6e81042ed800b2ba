"""Between canopyq, transformers and compressed-tensors: a checkpoint of one gives the same answers in the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors import safe_open
from torch import Tensor, nn

import canopyq as cq
from canopyq import cli
from canopyq.kernels.activations import dynamic, fixed, rounded
from canopyq.memory import bytes_held
from canopyq.nn.linear import quantized_layers
from canopyq.tensor.formats import IntFormat
from canopyq.tensor.scheme import Recipe

oracle = pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import ModelCompressor  # noqa: E402
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402
from transformers import AutoModelForCausalLM, CompressedTensorsConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # what dequantize=True always says

GROUP = {"strategy": "group", "group_size": 32}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
FIXED = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
OTHERS = {  # weights, input: as the library's own arguments
    "int4 groups": ({"num_bits": 4, "type": "int", **GROUP}, None),
    "int4 channels": ({"num_bits": 4, "type": "int", "strategy": "channel"}, None),
    "int4 asymmetric": ({"num_bits": 4, "type": "int", "symmetric": False, **GROUP}, None),
    "int8 channels": ({"num_bits": 8, "type": "int", "strategy": "channel"}, None),
    "int8 groups asymmetric": ({"num_bits": 8, "type": "int", "symmetric": False, **GROUP}, None),
    "w8a8": ({"num_bits": 8, "type": "int", "strategy": "channel"}, TOKEN | {"type": "int"}),
    "w8a8 per tensor": ({"num_bits": 8, "type": "int", "strategy": "tensor"}, TOKEN | {"type": "int"}),
    "w8a8 asymmetric inputs": (
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        TOKEN | {"type": "int", "symmetric": False},
    ),
    "w8a8 static": ({"num_bits": 8, "type": "int", "strategy": "channel"}, FIXED | {"type": "int"}),
    "w8a8 static asymmetric inputs": (
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        FIXED | {"type": "int", "symmetric": False},
    ),
    "fp8 static": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, FIXED | {"type": "float"}),
    "fp8": ({"num_bits": 8, "type": "float", "strategy": "channel"}, TOKEN | {"type": "float"}),
    "fp8 per tensor": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, TOKEN | {"type": "float"}),
}


def in_transformers(folder: Path, dtype: torch.dtype, dequantize: bool = False) -> nn.Module:
    """The checkpoint in plain transformers, every tensor of it used and none missing."""
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


def close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for the rounding of a model that computes in ``dtype``: a few steps at the largest logit."""
    most = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    return float((one - other).abs().max()) <= most * float(one.abs().max())


def compare(ours: nn.Module, theirs: nn.Module, logits: Callable, dtype: torch.dtype, inputs: str | None) -> bool:
    """``inputs``: "static", "dynamic" or None. With static ranges both compute the same from float64, in which no
    number is decided by its last bit. Else the last bit of an input, and of its scale, which is kept in float32 here
    and in the input's dtype there, decides between two codes; then layer is held to layer on the same input."""
    if inputs is None:
        return close(logits(ours), logits(theirs), dtype)
    if inputs == "static" and dtype == torch.float32:
        return close(logits(ours.double()), logits(theirs.double()), torch.float64)
    seen = {}
    for name, _ in quantized_layers(ours):
        theirs.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    logits(theirs)
    return all(same_layer(layer, *seen[name]) for name, layer in quantized_layers(ours))


@torch.no_grad()
def same_layer(layer: nn.Module, x: Tensor, theirs: Tensor) -> bool:
    """Two roundings of an input to the same codes are at most a step apart, and so the outputs at most the steps times
    the weights, and what the dtype rounds: the weights, the result, and each input that stands for a code."""
    x, scheme = x.flatten(0, -2), layer.activations
    ranges = layer.input_scale, layer.input_zero_point
    codes = dynamic(x, scheme) if ranges[0] is None else fixed(x, scheme, *ranges)
    scale, size = codes.float_scale().double(), codes.dequantize(torch.float64).abs()
    step = scale.expand_as(size) if isinstance(scheme.format, IntFormat) else (size / 8).maximum(scale * 2**-9)
    weights = layer.quantized_weight.dequantize(torch.float64).abs()
    exact = 2**-24 if x.dtype == torch.float32 else 2**-8
    limit = 1.02 * step @ weights.t() + 4 * exact * (size @ weights.t())
    return bool(((layer(x) - theirs.flatten(0, -2)).abs().double() <= limit).all())


# Ours in theirs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "recipe", ["w8a16", "w4a16-g32", "w4a16-channel", "w2a16-g32", "w3a16-g32", "w5a16-channel",
               "w4a16-g32-asym", "w8a16-g32-asym", "w8a8", "fp8",
               "w8a8-static", "w8a8-asym", "w8a8-static-asym", "fp8-static", "w4a8-g32"]
)  # fmt: skip
def test_what_canopyq_writes_transformers_reads(
    recipe: str, dtype: torch.dtype, saved: Callable, logits: Callable
) -> None:
    parsed = Recipe.parse(recipe)
    inputs = None if parsed.activations is None else "static" if parsed.static else "dynamic"
    dense = "asym" in recipe and inputs is None
    theirs = in_transformers(saved(recipe), dtype, dequantize=dense)
    rounded = torch.bfloat16 if dense else dtype  # dequantize=True multiplies in the scale's dtype
    assert compare(cq.load(saved(recipe), dtype=dtype), theirs, logits, rounded, inputs)


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4"])
def test_fp4_in_transformers(recipe: str, saved: Callable, logits: Callable) -> None:
    """It makes bfloat16 of FP4 whatever the model computes in, and the values are ours bit by bit."""
    ours, theirs = cq.load(saved(recipe), dtype="bfloat16"), in_transformers(saved(recipe), torch.bfloat16)
    assert close(logits(ours), logits(theirs), torch.bfloat16)
    for name, layer in quantized_layers(ours):
        assert torch.equal(theirs.get_submodule(name).weight, layer.quantized_weight.dequantize(torch.bfloat16)), name
    if Version(version("transformers")) >= Version("5.23"):  # 5.17 leaves float32 and bfloat16 side by side
        dense = in_transformers(saved(recipe), torch.float32, dequantize=True)
        assert close(logits(cq.load(saved(recipe))), logits(dense), torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"):
        logits(in_transformers(saved(recipe), torch.float32))
    assert "in bfloat16" in cq.inspect(saved(recipe)).tools["transformers"]


@pytest.mark.parametrize("recipe", ["nvfp4-w4a4", "mxfp4-w4a4"])
def test_fp4_inputs_in_transformers(recipe: str, saved: Callable, logits: Callable) -> None:
    """The library rounds a float32 input to the same values; in bfloat16 it rounds NVFP4's scales twice."""
    ours, theirs = cq.load(saved(recipe), dtype="bfloat16"), in_transformers(saved(recipe), torch.bfloat16)
    mine, other = logits(ours), logits(theirs)
    whole = logits(cq.load(saved(recipe.removesuffix("-w4a4")), dtype="bfloat16"))  # its inputs are not rounded
    assert (mine - other).norm() < 1.5 * (mine - whole).norm()  # independent roundings of inputs differ by √2 of one
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 7)[:, None]
    x[3, :32] = 0
    for name, layer in quantized_layers(ours):
        module = theirs.get_submodule(name)
        assert (layer.input_scale is None) == (recipe == "mxfp4-w4a4")
        if layer.in_features == 64:
            expected = forward_quantize(module, x, "input", module.quantization_scheme.input_activations)
            assert torch.equal(rounded(x, layer.activations, layer.input_scale), expected), name
    assert cq.inspect(saved(recipe)).tools["canopyq"] == "yes" and cq.inspect(saved(recipe)).made_by["recipe"] == recipe


@pytest.mark.parametrize("recipe", ["w8a8-static", "w8a8-static-asym", "fp8-static"])
def test_static_ranges_come_back_bit_for_bit(recipe: str, saved: Callable) -> None:
    loaded = cq.load(saved(recipe))
    folder = saved(recipe)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.layers.0.mlp.up_proj.input_scale").shape == (1,)
    for name, layer in quantized_layers(loaded):
        assert layer.input_scale.dtype == torch.bfloat16 and layer.input_scale.shape == (1,)
        assert (layer.input_zero_point is None) == ("asym" not in recipe), name
    assert cq.inspect(folder).made_by["recipe"] == recipe
    assert "static" in str(cq.inspect(folder)) and cq.inspect(folder).tools["transformers"].startswith("yes")


@pytest.mark.parametrize(
    ("recipe", "error", "package", "since"),
    [
        ("w4a16-g32-asym", "ignore_mismatched_sizes", "transformers", "5.23"),
        ("w4a16-g48", "must be divisble by the given group_size", "compressed-tensors", "0.19"),
    ],
)
def test_what_inspect_says_transformers_refuses(
    recipe: str, error: str, package: str, since: str, saved: Callable, logits: Callable
) -> None:
    """Once this fails, a bug elsewhere is mended, and `readers` has to learn it."""
    if Version(version(package)) < Version(since):
        pytest.skip(f"{package} {version(package)} takes what later versions refuse")
    verdict = cq.inspect(saved(recipe)).tools["transformers"]
    assert not verdict.startswith("yes")
    with pytest.raises((RuntimeError, ValueError), match=error):
        logits(in_transformers(saved(recipe), torch.float32))


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"max_shard_bytes": 20_000}], ids=str)
def test_tied_heads_and_several_files(options: dict, llama: Callable, tmp_path: Path, logits: Callable) -> None:
    model = llama(**{name: value for name, value in options.items() if name != "max_shard_bytes"})
    cq.quantize_(model, "w4a16-g32")
    cq.save(model, tmp_path / "model", check=False, max_shard_bytes=options.get("max_shard_bytes", 10**9))
    theirs = in_transformers(tmp_path / "model", torch.float32)
    assert close(logits(cq.load(tmp_path / "model")), logits(theirs), torch.float32)


def test_a_quantized_head(llama: Callable, tmp_path: Path, logits: Callable) -> None:
    model = llama(tie_word_embeddings=True)
    cq.quantize_(model, "w8a16+head")
    cq.save(model, tmp_path / "model", check=False)
    assert close(
        logits(cq.load(tmp_path / "model")), logits(in_transformers(tmp_path / "model", torch.float32)), torch.float32
    )


def test_packed_here_dense_there(saved: Callable, logits: Callable) -> None:
    """What transformers does at its first forward, and canopyq does not."""
    ours, theirs = cq.load(saved("w4a16-g32"), dtype="bfloat16"), in_transformers(saved("w4a16-g32"), torch.bfloat16)
    q_proj = "model.layers.0.self_attn.q_proj"
    assert hasattr(theirs.get_submodule(q_proj), "weight_packed")
    sizes = []
    for model in (ours, theirs):
        before = bytes_held(model)
        logits(model)
        sizes.append((before, bytes_held(model)))
    (ours_before, ours_after), (_, theirs_after) = sizes
    assert theirs.get_submodule(q_proj).weight.dtype == torch.bfloat16
    assert ours_after <= 1.05 * ours_before and theirs_after > 2 * ours_after


# Theirs in ours -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fix_inputs(model: nn.Module) -> None:
    """Give every quantized layer the range of its inputs on a fixed batch."""

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].float()
        scale, zero_point = calculate_qparams(x.min(), x.max(), module.quantization_scheme.input_activations)
        module.input_scale.data = scale.reshape(1).to(module.input_scale.dtype)
        if hasattr(module, "input_zero_point"):
            module.input_zero_point.data = zero_point.reshape(1).to(module.input_zero_point.dtype)

    layers = [module for module in model.modules() if getattr(module, "quantization_scheme", None) is not None]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    model(torch.arange(3, 51).reshape(2, 24))
    for handle in handles:
        handle.remove()


def write(model: nn.Module, folder: Path, weights: dict, inputs: dict | None) -> None:
    """Quantize and save with compressed-tensors alone, its own scales and its own packing."""
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if (own := getattr(module, "quantization_scheme", None)) is None:
            continue
        w, size = module.weight.detach().float(), own.weights.group_size
        rows = {"group": w.reshape(len(w), -1, size or 1), "channel": w[:, None], "tensor": w.reshape(1, -1)}
        rows = rows[weights["strategy"]]
        scale, zero_point = calculate_qparams(rows.amin(-1), rows.amax(-1), own.weights)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero_point.to(module.weight_zero_point.dtype)
    if inputs is not None and not inputs["dynamic"]:
        fix_inputs(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_what_compressed_tensors_writes_canopyq_reads(
    name: str, dtype: torch.dtype, llama: Callable, tmp_path: Path, logits: Callable
) -> None:
    write(llama(dtype), tmp_path / "model", *OTHERS[name])
    ours = cq.load(tmp_path / "model", dtype=dtype)
    assert len(list(quantized_layers(ours))) == 14
    dense = name in ("int4 asymmetric", "int8 groups asymmetric")
    theirs = in_transformers(tmp_path / "model", dtype, dequantize=dense)
    fixed = OTHERS[name][1]
    inputs = None if fixed is None else "dynamic" if fixed["dynamic"] else "static"
    assert compare(ours, theirs, logits, dtype, inputs)
    assert cq.inspect(tmp_path / "model").tools["canopyq"] == "yes"


@pytest.mark.parametrize("preset", ["NVFP4A16", "MXFP4A16", "NVFP4", "MXFP4"])
def test_fp4_that_compressed_tensors_writes(preset: str, llama: Callable, tmp_path: Path, logits: Callable) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import generate_gparam

    model = llama()
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if (own := getattr(module, "quantization_scheme", None)) is not None:
            w = module.weight.detach().float()
            rows, whole = w.reshape(len(w), -1, own.weights.group_size), None
            if hasattr(module, "weight_global_scale"):
                whole = generate_gparam(w.min(), w.max()) * 1.7  # not the one that we would take
                module.weight_global_scale.data = whole
                if own.input_activations is not None:
                    module.input_global_scale.data = torch.tensor([1234.5])
            scale, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), own.weights, global_scale=whole)
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "model")
    compressor.update_config(tmp_path / "model")
    assert cq.inspect(tmp_path / "model").tools["canopyq"] == "yes"
    ours, theirs = cq.load(tmp_path / "model", dtype="bfloat16"), in_transformers(tmp_path / "model", torch.bfloat16)
    mine, other = logits(ours), logits(theirs)
    assert float((mine - other).norm() / other.norm()) < (0.02 if preset.endswith("A16") else 0.15)
    for name, layer in quantized_layers(ours):
        assert torch.equal(theirs.get_submodule(name).weight, layer.quantized_weight.dequantize(torch.bfloat16)), name
        assert preset != "NVFP4" or layer.input_scale.tolist() == [1234.5]


def test_theirs_saved_again_by_canopyq(llama: Callable, tmp_path: Path, logits: Callable) -> None:
    write(llama(), tmp_path / "theirs", *OTHERS["int4 asymmetric"])
    loaded = cq.load(tmp_path / "theirs")
    cq.save(loaded, tmp_path / "ours")
    assert torch.equal(logits(cq.load(tmp_path / "ours")), logits(loaded))


# The tutor ------------------------------------------------------------------------------------------------------------


def command(*arguments: str, monkeypatch, capsys) -> dict:
    monkeypatch.setattr(sys, "argv", ["canopyq", *arguments, "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_tutor_from_disk_gives_the_figures_of_the_tutor_in_memory(
    tmp_path: Path, monkeypatch, capsys, logits: Callable
) -> None:
    def call(*arguments: str) -> dict:
        return command(*arguments, monkeypatch=monkeypatch, capsys=capsys)

    out = str(tmp_path / "w4")
    call("quantize", "tutor", "--recipe", "w4a16-g128", "--out", out)
    disk = call("eval", out, "--questions", "17")
    memory = call("eval", "tutor", "--recipe", "w4a16-g128", "--questions", "17")
    for key in ("dtype", "questions", "reference", "model", "kl", "lost", "gained", "p_value"):
        assert disk[key] == memory[key], key
    loaded = cq.load(out)
    weights = [layer.quantized_weight for _, layer in quantized_layers(loaded)]
    assert len(weights) == 56 and all(8 * weight.nbytes <= 4.3 * weight.shape.numel() for weight in weights)
    assert close(logits(loaded), logits(in_transformers(Path(out), torch.float32)), torch.float32)
