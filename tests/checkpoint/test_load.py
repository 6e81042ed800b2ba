"""`cq.load`: packed weights, right answers, and a clear refusal of everything that is damaged or lies."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import struct
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import canopyq as cq
from benchmarks.load import measure
from canopyq import cli
from canopyq.checkpoint.files import INDEX, SINGLE, Reader
from canopyq.errors import CanopyError
from canopyq.nn.linear import QuantizedLinear, quantized_layers

Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


@pytest.fixture
def folder(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A whole checkpoint, 4 bits in groups of 32 with zero points, to damage."""
    return Path(shutil.copytree(saved("w4a16-g32-asym"), tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    held = load_file(folder / SINGLE)
    change(held)
    save_file(held, folder / SINGLE, metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def requantize(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def weights_of(config: dict) -> dict:
    return config["config_groups"]["group_0"]["weights"]


def inputs_of(config: dict) -> dict:
    return config["config_groups"]["group_0"]["input_activations"]


# What is loaded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w4a16-g32-asym", "w8a16"])
def test_weights_stay_packed(recipe: str, saved: Callable, logits: Callable) -> None:
    loaded = cq.load(saved(recipe))
    layers = dict(quantized_layers(loaded))
    assert len(layers) == 14 and not isinstance(loaded.lm_head, QuantizedLinear)
    for _ in range(2):  # and so they do once a kernel has laid them out
        for layer in layers.values():
            bits = 8 * sum(part.untyped_storage().nbytes() for part in layer.quantized_weight.parts.values())
            assert bits <= {"w4a16-g32-asym": 4.9, "w8a16": 8.6}[recipe] * layer.out_features * layer.in_features
        logits(loaded)


@pytest.mark.parametrize(("recipe", "most"), [("w4a16-g128", 4.3), ("w8a16", 8.3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_storages_hold_the_bits_that_were_promised(
    recipe: str, most: float, dtype: torch.dtype, llama: Callable, logits: Callable, tmp_path: Path, monkeypatch
) -> None:
    """All memory behind the linear weights; and none of what was read from the files lives on beside it."""
    model = llama(dtype, hidden_size=256, intermediate_size=512)
    cq.quantize_(model, recipe)
    cq.save(model, tmp_path / "model", check=False)
    read: list[weakref.ref] = []
    real = Reader.__call__
    monkeypatch.setattr(
        Reader, "__call__",
        lambda self, name: (tensor := real(self, name), read.append(weakref.ref(tensor)))[0],
    )  # fmt: skip
    loaded = cq.load(tmp_path / "model")
    gc.collect()
    assert len(read) > 40 and not any(tensor() is not None for tensor in read)
    for _ in range(2):  # and once a kernel has laid them out
        storages = {}
        for _, layer in quantized_layers(loaded):
            for tensor in [*layer.parameters(), *layer.buffers()]:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        weights = sum(layer.out_features * layer.in_features for _, layer in quantized_layers(loaded))
        assert 8 * sum(storages.values()) / weights <= most
        logits(loaded)


@pytest.mark.parametrize("dtype", [None, "float32", torch.bfloat16, "float16"])
def test_dtypes(dtype: torch.dtype | str | None, saved: Callable) -> None:
    loaded = cq.load(saved("w4a16-g32-asym"), dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    assert loaded.dtype == wanted and loaded.get_input_embeddings().weight.dtype == wanted
    assert loaded.get_submodule(Q).quantized_weight.scale.dtype == torch.bfloat16  # scales stay as they are


def test_what_comes_beside_the_weights(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    loaded = cq.load(folder)
    assert loaded.generation_config.max_new_tokens == 7 and not loaded.training
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.generate(torch.tensor([[3, 4]]), do_sample=False, pad_token_id=0).shape[1] <= 9


def test_the_file_may_go_once_it_is_loaded(folder: Path, logits: Callable) -> None:
    loaded = cq.load(folder, dtype="bfloat16")
    before = logits(loaded)
    (folder / SINGLE).write_bytes(bytes((folder / SINGLE).stat().st_size))  # a mapped file would change the model
    assert torch.equal(logits(loaded), before)


def test_several_files(folder: Path, logits: Callable) -> None:
    before = logits(cq.load(folder))
    held = load_file(folder / SINGLE)
    names = list(held)
    (folder / SINGLE).unlink()
    for i in range(3):
        save_file({name: held[name] for name in names[i::3]}, folder / f"part-{i}.safetensors")
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(cq.load(folder)), before)


def test_tensors_that_no_module_holds(folder: Path) -> None:
    rewrite(folder, lambda x: x.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    cq.load(folder)  # older files have it, and every model computes it
    rewrite(folder, lambda x: x.update({"model.layers.2.extra": torch.ones(8)}))
    with pytest.raises(CanopyError, match="no place for model.layers.2.extra; mend config.json, or use strict=False"):
        cq.load(folder)
    cq.load(folder, strict=False)


def test_a_head_that_other_tools_left_tied(llama: Callable, tmp_path: Path, logits: Callable) -> None:
    model = llama(tie_word_embeddings=True)
    cq.quantize_(model, "w4a16-g32")
    cq.save(model, tmp_path / "model", check=False)
    assert "lm_head.weight" not in load_file(tmp_path / "model" / SINGLE)
    one = cq.load(tmp_path / "model")
    assert one.lm_head.weight is one.get_input_embeddings().weight
    rewrite(tmp_path / "model", lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].clone()}))
    two = cq.load(tmp_path / "model")  # as files of older tools hold it
    assert two.lm_head.weight is two.get_input_embeddings().weight and torch.equal(logits(one), logits(two))
    rewrite(tmp_path / "model", lambda x: x["lm_head.weight"].mul_(2))
    apart = cq.load(tmp_path / "model")
    assert torch.allclose(logits(apart), 2 * logits(one), rtol=1e-5)


# Bad input ------------------------------------------------------------------------------------------------------------


def huge(folder: Path, shape: list[int], offsets: list[int] | None = None) -> None:
    """The header of the file, and in it a tensor of another shape."""
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[NORM]["shape"] = shape
    if offsets:
        header[NORM]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def poke(folder: Path, name: str, value: float) -> None:
    rewrite(folder, lambda x: x[name].view(-1).__setitem__(-1, value))


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


BAD = {
    "cut to nothing": (lambda f: os.truncate(f / SINGLE, 0), SINGLE),
    "cut in the header": (lambda f: os.truncate(f / SINGLE, 500), SINGLE),
    "cut in the data": (lambda f: os.truncate(f / SINGLE, 40_000), SINGLE),
    "cut by one byte": (lambda f: os.truncate(f / SINGLE, (f / SINGLE).stat().st_size - 1), SINGLE),
    "2^60 values": (lambda f: huge(f, [2**30, 2**30]), SINGLE),
    "2^60 values and offsets": (lambda f: huge(f, [2**30, 2**30], [0, 2**61]), SINGLE),
    "more than 2^60": (lambda f: huge(f, [2**31, 2**31]), SINGLE),
    "another hidden size": (lambda f: reconfigure(f, hidden_size=128), r"by config.json it has to be"),
    "another mlp": (lambda f: reconfigure(f, intermediate_size=128), r"gate_proj.weight_packed is int32 \(160, 8\)"),
    "more heads": (lambda f: reconfigure(f, num_key_value_heads=4), r"k_proj.weight_packed is"),
    "another vocabulary": (lambda f: reconfigure(f, vocab_size=97), r"has to be floats \(97, 64\)"),
    "a layer too many": (lambda f: reconfigure(f, num_hidden_layers=3), "lacks model.layers.2"),
    "a layer too few": (lambda f: reconfigure(f, num_hidden_layers=1), "no place for model.layers.1"),
    "a billion layers": (lambda f: reconfigure(f, num_hidden_layers=10**9), "num_hidden_layers: 1000000000"),
    "half a layer": (lambda f: reconfigure(f, num_hidden_layers=1.5), "config.json"),
    "a norm of 2^40": (lambda f: reconfigure(f, hidden_size=2**40), "more than the files hold|makes no model"),
    "a head of 2^33": (lambda f: reconfigure(f, head_dim=2**33), "more than the files hold"),
    "no such model": (lambda f: reconfigure(f, model_type="lama"), "is no model's config"),
    "another model": (lambda f: reconfigure(f, model_type="gpt2"), "gpt2"),
    "no config of quantization": (lambda f: reconfigure(f, quantization_config=...), "holds no quantized model"),
    "config of text": (lambda f: (f / "config.json").write_text("<html>"), "no valid JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "unknown format": (lambda f: requantize(f, lambda q: q["config_groups"]["group_0"].update(format="pack-4")),
                       "unknown format 'pack-4'; did you mean 'pack-quantized'"),
    "unread format": (lambda f: requantize(f, lambda q: q["config_groups"]["group_0"].update(format="marlin-24")),
                      "'marlin-24' of group_0 is not read yet"),
    "other groups": (lambda f: requantize(f, lambda q: weights_of(q).update(group_size=64)),
                     r"weight_scale is bfloat16 \(64, 2\)"),
    "other bits": (lambda f: requantize(f, lambda q: weights_of(q).update(num_bits=8)), "weight_packed is int32"),
    "symmetric": (lambda f: requantize(f, lambda q: weights_of(q).update(symmetric=True)),
                  "weight_zero_point has no place"),
    "all ignored": (lambda f: requantize(f, lambda q: q.update(ignore=["re:.*"])), "names no linear layer"),
    "head not ignored": (lambda f: requantize(f, lambda q: q.update(ignore=[])), "lm_head.* is missing"),
    "NaN scale": (lambda f: poke(f, f"{Q}.weight_scale", math.nan), f"{Q}: weight_scale holds values that are not"),
    "infinite scale": (lambda f: poke(f, f"{Q}.weight_scale", math.inf), "weight_scale holds values that are not"),
    "zero scale": (lambda f: poke(f, f"{Q}.weight_scale", 0.0), "weight_scale holds values that are not"),
    "negative scale": (lambda f: poke(f, f"{Q}.weight_scale", -0.1), "weight_scale holds values that are not"),
    "wrong weight_shape": (lambda f: poke(f, f"{Q}.weight_shape", 65), r"weight_shape says \[64, 65\]"),
    "no scales": (lambda f: rewrite(f, lambda x: x.pop(f"{Q}.weight_scale")), "weight_scale is missing"),
    "no zero points": (lambda f: rewrite(f, lambda x: x.pop(f"{Q}.weight_zero_point")), "weight_zero_point is missing"),
    "no norm": (lambda f: rewrite(f, lambda x: x.pop(NORM)), "lacks model.norm.weight; download or write it again"),
    "whole codes": (lambda f: rewrite(f, lambda x: x.update({NORM: torch.ones(64, dtype=torch.int32)})), "be floats"),
    "a pickle": (to_pickle, "is a pickle, and reading a pickle runs whatever code is in it"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "has neither model.safetensors nor"),
    "broken generation": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints(name: str, folder: Path) -> None:
    damage, part = BAD[name]
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CanopyError, match=part) as refused:
        cq.load(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    try:
        promised = cq.inspect(folder).tools["canopyq"] == "yes"
    except CanopyError:
        promised = False
    assert promised == name.endswith(" scale"), "headers do not tell what a scale is, and all else they do"
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


BAD_INPUTS = {
    "no scale": (lambda f: rewrite(f, lambda x: x.pop(f"{Q}.input_scale")), "input_scale is missing"),
    "no zero point": (lambda f: rewrite(f, lambda x: x.pop(f"{Q}.input_zero_point")), "input_zero_point is missing"),
    "NaN scale": (lambda f: poke(f, f"{Q}.input_scale", math.nan), f"{Q}: input_scale holds values that are not"),
    "zero scale": (lambda f: poke(f, f"{Q}.input_scale", 0.0), "input_scale holds values that are not"),
    "a scale for each feature": (lambda f: rewrite(f, lambda x: x.update({f"{Q}.input_scale": torch.ones(64)})),
                                 r"input_scale is float32 \(64,\), by the config it has to be .* \(1,\)"),
    "a wide zero point": (lambda f: rewrite(f, lambda x: x.update({f"{Q}.input_zero_point": torch.ones(1)})),
                          "input_zero_point is float32"),
    "dynamic": (lambda f: requantize(f, lambda q: inputs_of(q).update(dynamic=True, strategy="token")),
                "input_scale has no place"),
    "symmetric": (lambda f: requantize(f, lambda q: inputs_of(q).update(symmetric=True)),
                  "input_zero_point has no place"),
    "4 bits": (lambda f: (requantize(f, lambda q: inputs_of(q).update(num_bits=4)),
                          poke(f, f"{Q}.input_zero_point", 100)), "holds values outside the codes of int4"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "part"), BAD_INPUTS.values(), ids=[name.replace(" ", "_") for name in BAD_INPUTS])
def test_bad_static_ranges(damage: Callable[[Path], object], part: str, saved: Callable, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("w8a8-static-asym"), tmp_path / "model"))
    damage(folder)
    with pytest.raises(CanopyError, match=part):
        cq.load(folder)


@pytest.mark.parametrize("name", ["cut in the data", "unknown format", "NaN scale", "a pickle", "a head of 2^33"])
def test_bad_checkpoints_on_the_command_line(name: str, folder: Path, monkeypatch, capsys) -> None:
    BAD[name][0](folder)
    monkeypatch.setattr(sys, "argv", ["canopyq", "eval", str(folder), "--questions", "17"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith("canopyq: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"device": "meta"}, "device 'meta' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"dtype": torch.float64}, "dtype=torch.float64"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(options: dict, part: str, saved: Callable) -> None:
    with pytest.raises(CanopyError, match=part):
        cq.load(saved("w4a16-g32-asym"), **options)


def test_code_beside_the_weights_is_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    (folder / "configuration_trap.py").write_text((folder / "modeling_trap.py").read_text())
    reconfigure(folder, model_type="trap", auto_map={"AutoConfig": "configuration_trap.Trap",
                                                     "AutoModelForCausalLM": "modeling_trap.Trap"})  # fmt: skip
    with pytest.raises(CanopyError):
        cq.load(folder)
    reconfigure(folder, model_type="llama")
    try:
        cq.load(folder)
    except CanopyError:
        pass
    assert not (tmp_path / "sprung").exists()


# Fuzz -----------------------------------------------------------------------------------------------------------------

VALUES = st.sampled_from([0, -1, 1, 2, 7, 3.5, 2**31, 2**33, 2**40, 2**63, 10**30, -(2**70), "x", "", None, True, False,
                          "gpt2", "mixtral", "bert", [], {}, [1], {"a": 1}])  # fmt: skip
KEYS = ["architectures", "attention_bias", "dtype", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
        "layer_types", "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "pad_token_id", "quantization_config", "rms_norm_eps", "rope_parameters", "rope_scaling",
        "sliding_window", "tie_word_embeddings", "auto_map", "vocab_size"]  # fmt: skip


def refused_or_whole(folder: Path) -> None:
    """A `CanopyError`, or a model whose linear layers have their shapes; and no more memory than the file explains.

    So it is with `inspect`.
    """
    start_peak()
    before = peak()
    try:
        cq.inspect(folder)
    except CanopyError as error:
        assert "\n" not in str(error) and len(str(error)) < 800
    try:
        loaded = cq.load(folder)
    except CanopyError as error:
        assert "\n" not in str(error) and len(str(error)) < 800
    else:
        for _, layer in quantized_layers(loaded):
            assert layer.quantized_weight.codes.shape == (layer.out_features, layer.in_features)
    assert peak() - before < 100e6


def start_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux: the peak of the process so far, which hides more


def peak() -> int:
    """The most bytes that were resident since `start_peak`; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def damaged(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes the checkpoint anew, with other bytes in one of its files."""
    whole = saved("w4a16-g32-asym")
    copy = Path(shutil.copytree(whole, tmp_path_factory.mktemp("fuzz") / "model"))
    cq.load(copy)

    def damage(name: str, content: bytes) -> Path:
        for file in (SINGLE, "config.json"):
            (copy / file).write_bytes((whole / file).read_bytes() if file != name else content)
        return copy

    return damage


@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
@settings(max_examples=50)
def test_any_config_is_refused_or_loaded(changes: dict, damaged: Callable, saved: Callable) -> None:
    config = json.loads((saved("w4a16-g32-asym") / "config.json").read_text()) | changes
    refused_or_whole(damaged("config.json", json.dumps(config).encode()))


ENTRY = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from(["F32", "BF16", "F16", "I8", "I32", "I64", "F8_E4M3", "BOOL", "U8", "F4"]),
                  "shape": st.lists(st.sampled_from([0, 1, 2, 8, 64, 128, 2**20, 2**40, -1]), max_size=3),
                  "data_offsets": st.lists(st.sampled_from([0, 1, 128, 256, 2**20, 2**62]), min_size=2, max_size=2)},
)  # fmt: skip


@given(place=st.integers(0, 200), entry=ENTRY, name=st.none() | st.sampled_from([NORM, f"{Q}.weight", "x", ""]))
@settings(max_examples=50)
def test_any_header_is_refused_or_loaded(
    place: int, entry: dict, name: str | None, damaged: Callable, saved: Callable
) -> None:
    content = (saved("w4a16-g32-asym") / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    key = list(header)[place % len(header)]
    header[name if name is not None else key] = dict(header.pop(key)) | entry
    text = json.dumps(header).encode()
    refused_or_whole(damaged(SINGLE, struct.pack("<Q", len(text)) + text + content[8 + length :]))


@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8), cut=st.none() | st.floats(0, 1))
@settings(max_examples=50, suppress_health_check=[HealthCheck.large_base_example])
def test_any_bytes_are_refused_or_loaded(edits: list, cut: float | None, damaged: Callable, saved: Callable) -> None:
    content = bytearray((saved("w4a16-g32-asym") / SINGLE).read_bytes())
    for place, value in edits:
        content[int(place * (len(content) - 1))] = value
    refused_or_whole(damaged(SINGLE, bytes(content[: None if cut is None else int(cut * len(content))])))


# The benchmark --------------------------------------------------------------------------------------------------------


def test_the_benchmark_times_both_loaders() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}
    found = measure("w4a16-g32", 1, **sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    for cache in ("in_cache", "from_disk"):
        for name in ("canopyq", "transformers_bf16"):
            assert 0 < found[cache][name]["loaded"] <= found[cache][name]["first_token"]
        assert found[cache]["ratio"] > 0
