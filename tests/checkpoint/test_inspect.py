"""`inspect`: what a checkpoint holds, counted; who loads it; and what it says of one that nobody here can load."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import canopyq as cq
from canopyq import cli
from canopyq.checkpoint.config import Group, Quantization
from canopyq.checkpoint.files import SINGLE
from canopyq.checkpoint.layout import FLOAT, INT, PACKED
from canopyq.checkpoint.readers import DEQUANTIZE, VLLM_HUMMING, YES, notes, readers
from canopyq.errors import CanopyError
from canopyq.tensor.scheme import Scheme
from canopyq.tutor import loading


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["canopyq", "inspect", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return call


# What it holds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w4a16-g32-asym", "w8a16", "w8a8", "fp8"])
def test_every_byte_is_counted_once(recipe: str, saved: Callable) -> None:
    found = cq.inspect(saved(recipe))
    held = load_file(saved(recipe) / SINGLE)
    assert sum(found.bytes.values()) == sum(tensor.nbytes for tensor in held.values())
    assert (found.tensors, found.files, found.model) == (len(held), 1, "llama")

    def size(*ends: str) -> int:
        layers = {name: tensor for name, tensor in held.items() if "_proj." in name}
        return sum(tensor.nbytes for name, tensor in layers.items() if name.endswith(ends))

    assert found.bytes["codes"] == size(".weight", ".weight_packed") and found.bytes["scales"] == size("_scale")
    assert found.bytes["zero points"] == size("_zero_point") and found.bytes["shapes"] == size("_shape")
    (group,) = found.groups
    assert (group.layers, group.weights) == (14, 2 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 160))
    assert group.bits_per_weight == 8 * size("") / group.weights
    assert found.ignore == ("lm_head",) and found.made_by["canopyq"] == cq.__version__
    assert found.tools["canopyq"] == "yes"


def test_it_reads_well_and_as_json(saved: Callable, command: Callable) -> None:
    code, out, err = command(str(saved("w4a16-g32-asym")))
    assert code == 0 and err == ""
    for part in ("llama, 63 tensors in 1 file", "14 layers pack-quantized, int4 g32 asymmetric",
                 "zero points", "canopyq      yes", DEQUANTIZE, "note: transformers turns all weights into dense",
                 "size mismatch on weight_zero_point"):  # fmt: skip
        assert part in out
    code, out, err = command(str(saved("w4a16-g32-asym")), "--json")
    found = json.loads(out)
    assert code == 0 and found["tools"] == cq.inspect(saved("w4a16-g32-asym")).tools
    assert found["groups"][0]["layers"] == 14 and found["bytes"]["zero points"] > 0 and len(found["notes"]) == 2
    assert cq.inspect(saved("w8a16"))._repr_html_().startswith("<pre>")


def test_the_original_is_described_too(command: Callable) -> None:
    found = cq.inspect(loading.path())
    assert found.tools == {"canopyq": "no: it is not quantized; use transformers"} and found.groups == ()
    assert found.bytes["unquantized"] == sum(found.bytes.values()) == 2 * 8_196_352


# Who loads it ---------------------------------------------------------------------------------------------------------


def group(weights: Scheme, format: str, activations: Scheme | None = None, *targets: str) -> Group:
    return Group("group_0", targets or ("Linear",), weights, activations, format)


TOKEN8 = Scheme("int8", "token")
INT4 = Scheme("int4", "g32")
LAYER = "model.layers.0.self_attn"
ALL = {f"{LAYER}.{name}": (64, 64) for name in ("q_proj", "k_proj", "v_proj")}


@pytest.mark.parametrize(
    ("groups", "transformers", "vllm"),
    [
        ([group(INT4, PACKED)], YES, "yes, by its source"),
        ([group(Scheme("int8", "channel"), INT, TOKEN8)], YES, "yes, by its source"),
        ([group(Scheme("int4", "g32", False), PACKED)], DEQUANTIZE, "yes, by its source"),
        ([group(Scheme("int4", "tensor", False), PACKED)], YES, "no: packed weights need a scale per group or channel"),
        ([group(Scheme("int2", "g32"), PACKED)], YES, VLLM_HUMMING),
        ([group(INT4, PACKED, TOKEN8)], YES, "yes, by its source"),
        ([group(Scheme("int8", "channel", False), INT, TOKEN8)], YES, "no: W8A8 needs symmetric weights"),
        ([group(Scheme("fp8", "g32"), FLOAT)], YES, "no: float-quantized weights need a scale per channel or tensor"),
        ([group(Scheme("int4", "g48"), PACKED)], f"no: groups of 48 leave a rest in the 64 inputs of {LAYER}.q_proj",
         "no: groups of 48"),
        ([group(INT4, PACKED, None, "re:.*q_proj"), group(Scheme("int8", "channel"), PACKED)], YES,
         f"no: q_proj, k_proj, v_proj of {LAYER} are fused there"),
        ([group(Scheme("int4", "g32", False), PACKED), group(Scheme("fp8", "channel"), FLOAT)],
         "no: zero points need dequantize=True, and that fails on several formats", "yes, by its source"),
    ],
)  # fmt: skip
def test_readers(groups: list[Group], transformers: str, vllm: str) -> None:
    found = readers(Quantization(tuple(groups), ()), ALL)
    assert found["transformers"] == transformers and found["vLLM"].startswith(vllm)


def test_a_layer_of_a_fused_three_that_stays() -> None:
    quantization = Quantization((group(INT4, PACKED),), (f"{LAYER}.v_proj",))
    found = readers(quantization, {name: shape for name, shape in ALL.items() if "v_proj" not in name})
    assert found["vLLM"].startswith("no: q_proj, k_proj, v_proj")


def test_notes_of_several_formats() -> None:
    groups = (group(INT4, PACKED, None, "re:.*q_proj"), group(Scheme("fp8", "channel"), FLOAT))
    assert any("groups of different formats" in note for note in notes(Quantization(groups, ())))


def test_saving_and_streaming_say_it_too(llama: Callable, tmp_path: Path) -> None:
    from canopyq.checkpoint.stream import prepare

    llama().save_pretrained(tmp_path / "plain")
    said: list[str] = []
    prepare(tmp_path / "plain", "w4a16-g32-asym", tmp_path / "out", say=said.append)
    model = llama()
    cq.quantize_(model, "w4a16-g32-asym")
    for text in (said[0], str(cq.save(model, tmp_path / "out", check=False))):
        assert f"transformers will load it: {DEQUANTIZE}" in text and "vLLM will load it: yes" in text


# What cannot be loaded ------------------------------------------------------------------------------------------------


def test_what_canopyq_cannot_load_is_described_with_the_reason(saved: Callable, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("w4a16-g32"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["format"] = "marlin-24"
    (folder / "config.json").write_text(json.dumps(config))
    found = cq.inspect(folder)
    assert found.tools["canopyq"].startswith("no: format 'marlin-24'") and found.bytes["codes"] > 0
    config["quantization_config"] |= {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quant_method 'gptq' is not read" in cq.inspect(folder).tools["canopyq"]


def test_a_layer_that_no_group_names(saved: Callable, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("w4a16-g32"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*down_proj")
    (folder / "config.json").write_text(json.dumps(config))
    assert "down_proj is quantized, and no group of the config names it" in cq.inspect(folder).tools["canopyq"]


@pytest.mark.parametrize(
    "shape",
    [torch.tensor([0, 64]), torch.tensor([-5, 64]), torch.tensor([float("nan"), 64]), torch.ones(3), torch.ones(1, 2)],
    ids=str,
)
def test_a_weight_shape_that_is_none(shape: torch.Tensor, saved: Callable, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("w4a16-g32"), tmp_path / "model"))
    held = load_file(folder / SINGLE)
    held["model.layers.0.self_attn.q_proj.weight_shape"] = shape
    save_file(held, folder / SINGLE)
    with pytest.raises(CanopyError, match="weight_shape"):
        cq.load(folder)
    found = cq.inspect(folder)
    assert found.groups[0].layers == 13 and found.tools["canopyq"].startswith("no: ")


@pytest.mark.parametrize("arguments", [["nowhere"], ["weights.bin"], ["."]], ids=" ".join)
def test_folders_that_hold_none(arguments: list[str], command: Callable, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert code == 2 and out == "" and err.startswith("canopyq: ") and err.count("\n") == 1
