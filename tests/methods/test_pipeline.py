"""Methods over whole models: what `quantize_` promises of them, and that plain transformers reads what they leave."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.methods import pipeline
from canopyq.methods.registry import Method
from canopyq.methods.transaction import Transaction
from canopyq.nn.linear import quantized_layers

SAVED = ("gptq", "hqq", "awq", "smoothquant", "rotation", "rotation+gptq")


def distance(one: torch.nn.Module, other: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        a, b = (model(ids).logits.float() for model in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("llama tied", method) for method in SAVED), ("gemma", "awq"), ("granite", "smoothquant"), ("gpt2", "rotation"),
     ("cohere", "rotation")],
)  # fmt: skip
def test_methods_round_trip_through_plain_transformers(name: str, method: str, make, ids, tmp_path: Path) -> None:
    recipe = "w8a8" if method == "smoothquant" else "w4a16-g32"
    original, model = make(name), make(name)
    report = cq.quantize_(model, recipe, method=method, calibration=ids)
    assert report.method == method and len(report.layers) == (8 if name == "gpt2" else 14)
    assert all(layer.output_error is not None for layer in report.layers)
    assert distance(original, model, ids[0]) < (0.05 if recipe == "w8a8" else 0.6)
    cq.save(model, tmp_path / "out")
    assert distance(model, cq.load(tmp_path / "out", dtype=torch.float32), ids[0]) < (2e-3 if name == "gpt2" else 1e-3)
    if name != "gpt2":  # its Conv1D is no layer that plain transformers has codes for
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert distance(model, loaded, ids[0]) < 0.02


@pytest.mark.parametrize(("name", "scaled"), [("mixtral", 26), ("phi3", 8), ("gpt_neox", 4), ("gemma2", 14)])
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_scaling_by_structure(name: str, scaled: int, method: str, make, ids) -> None:
    recipe = "w8a8" if method == "smoothquant" else "w3a16-g32"
    original, plain, model = make(name), make(name), make(name)
    cq.quantize_(plain, recipe)
    report = cq.quantize_(model, recipe, method=method, calibration=ids)
    assert sum("not scaled" not in " ".join(layer.notes) for layer in report.layers) >= scaled
    assert distance(original, model, ids[0]) < 1.05 * distance(original, plain, ids[0])


def test_gptq_and_rotation_help(make, ids) -> None:
    original, found = make("llama"), {}
    for method in ("rtn", "clip", "gptq", "rotation+gptq"):
        model = make("llama")
        cq.quantize_(model, "w3a16-g32", method=method, calibration=ids)
        found[method] = distance(original, model, ids[0])
    assert found["gptq"] < 0.8 * found["rtn"] and found["clip"] < found["rtn"]
    assert found["rotation+gptq"] < found["rtn"]


def test_coarse_activations_get_an_online_transform_which_no_file_holds(make, ids, tmp_path: Path) -> None:
    original, plain, rotated = make("llama"), make("llama"), make("llama")
    cq.quantize_(plain, "w4a4-g32", calibration=ids)
    report = cq.quantize_(rotated, "w4a4-g32", method="rotation", calibration=ids)
    assert any("at run time" in note for note in report.notes)
    assert distance(original, rotated, ids[0]) < distance(original, plain, ids[0])
    with pytest.raises(CanopyError, match=r"down_proj.*Hadamard transform at run time"):
        cq.save(rotated, tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_gptq_on_other_kinds_of_layers(name: str, make, ids) -> None:
    original, nearest, model = make(name), make(name), make(name)
    cq.quantize_(nearest, "w3a16-g32")
    report = cq.quantize_(model, "w3a16-g32", method="gptq", calibration=ids)
    assert distance(original, model, ids[0]) < distance(original, nearest, ids[0])
    kinds = {layer.name.rpartition(".")[2] for layer in report.layers}
    assert "c_attn" in kinds if name == "gpt2" else "down_proj" in kinds


def test_layers_without_data_are_rounded_to_nearest_and_said(make, ids) -> None:
    model = make("llama")
    report = cq.quantize_(model, "w4a16-g32+head+embed", method="gptq", calibration=ids)
    notes = {layer.name: layer.notes for layer in report.layers}
    assert notes["model.embed_tokens"] == ("no data reached it: rounded to nearest",)
    assert notes["lm_head"] == () and "no data reached it" in str(report)


@pytest.mark.parametrize("recipe", ["w8a8-static", "w8a8"])
def test_smoothing_with_fixed_ranges(recipe: str, make, ids) -> None:
    original, plain, smooth = make("llama"), make("llama"), make("llama")
    cq.quantize_(plain, recipe, calibration=ids)
    report = cq.quantize_(smooth, recipe, method="smoothquant", calibration=ids)
    assert distance(original, smooth, ids[0]) < distance(original, plain, ids[0])
    assert any("smoothed with α" in note for layer in report.layers for note in layer.notes)


@pytest.mark.parametrize("method", ["rotation+gptq", "awq", "smoothquant"])
def test_an_error_late_leaves_the_model_as_it_was(method: str, make, ids, monkeypatch) -> None:
    model = make("llama tied")
    before, hooks = copy.deepcopy(model.state_dict()), _hooks(model)
    blocks = pipeline.calibration_blocks

    def fail(*args, **options):
        for block, statistics in blocks(*args, **options):
            if block == "model.layers.1":
                down = statistics["model.layers.1.mlp.down_proj"]
                raise CanopyError(f"something in the last block, of {down.tokens} tokens")
            yield block, statistics

    monkeypatch.setattr(pipeline, "calibration_blocks", fail)
    recipe = "w8a8" if method == "smoothquant" else "w4a4-g32" if "rotation" in method else "w4a16-g32"
    with pytest.raises(CanopyError, match="something in the last block, of 288 tokens"):
        cq.quantize_(model, recipe, method=method, calibration=ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert _hooks(model) == hooks and not list(quantized_layers(model))


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("method", "recipe", "words"),
    [
        ("smoothquant", "w4a16-g32", "quantizes only the weights: that would harm them"),
        ("awq", "w8a8", "quantizes the inputs; use smoothquant"),
        ("awq+smoothquant", "w8a8", "rescale the same channels"),
        ("hqq", "nf4", "evenly spaced codes, which nf4 has not"),
        ("gptq+hqq", "w4a16", "weights are rounded once"),
        ("gptq+gptq", "w4a16", "names a part twice"),
        ("gtpq", "w4a16", "did you mean 'gptq'"),
        ("gptq", "w4a16-g32", "looks at the inputs of every layer; give calibration="),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(method: str, recipe: str, words: str, make) -> None:
    model = make("llama")
    with pytest.raises(CanopyError) as error:
        cq.quantize_(model, recipe, method=method)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(quantized_layers(model))


def test_rotation_leaves_a_model_that_it_refuses(make, ids) -> None:
    model = make("bert")
    before = model(ids[0]).logits
    with pytest.raises(CanopyError, match="LayerNorm"):
        cq.quantize_(model, "w4a16-g32", method="rotation", calibration=ids)
    assert torch.equal(model(ids[0]).logits, before)


def test_layers_of_zeros_and_constants_go_through(make, ids) -> None:
    for method in ("gptq", "awq", "hqq", "clip", "rotation+gptq"):
        model = make("llama")
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.zero_()
            model.model.layers[1].self_attn.q_proj.weight.fill_(0.125)
        report = cq.quantize_(model, "w4a16-g32", method=method, calibration=ids)
        assert model(ids[0]).logits.isfinite().all()
        if method == "gptq":
            notes = {layer.name: layer.notes for layer in report.layers}
            assert "128 of 128 inputs were zero" in notes["model.layers.0.mlp.down_proj"][0]


def test_names_of_methods() -> None:
    assert Method.parse("AWQ").rounding == "clip" and Method.parse("awq+gptq").rounding == "gptq"
    assert Method.parse("gptq+rotation").transforms == ("rotation",) and not Method.parse("rotation").needs_data


def test_a_transaction_refuses_weights_that_lie_elsewhere() -> None:
    with pytest.raises(CanopyError, match="accelerate keeps elsewhere"), Transaction() as transaction:
        transaction.change(torch.empty(2, 2, device="meta"), torch.zeros(2, 2))


@pytest.mark.parametrize("method", ["rtn", "awq+gptq"])
def test_layers_that_are_computed_as_one_share_their_global_scale(method: str, make, ids) -> None:
    """vLLM keeps one for query, key and value, and one for gate and up, and takes the largest that it finds."""
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(5)
    cq.quantize_(model, "nvfp4", method=method, calibration=ids)
    scales = {name: layer.quantized_weight.global_scale.item() for name, layer in quantized_layers(model)}
    for i in range(2):
        q, k, v, o = (scales[f"model.layers.{i}.self_attn.{name}_proj"] for name in "qkvo")
        gate, up, down = (scales[f"model.layers.{i}.mlp.{name}_proj"] for name in ("gate", "up", "down"))
        assert q == k == v != o and gate == up != down
