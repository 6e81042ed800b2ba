"""Mixed precision: a budget of bits spent layer by layer, and a few input features in 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.nn.linear import quantized_layers
from canopyq.nn.outlier_linear import OutlierLinear

CHOICES = ("w2a16-g32", "w4a16-g32", "w8a16-g32")


def kl(one: torch.nn.Module, other: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (torch.log_softmax(model(ids).logits, -1) for model in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_sensitivity_is_what_each_layer_alone_costs(make, ids) -> None:
    model = make("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs = cq.sensitivity(model, "w2a16-g32", ids[:1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(costs) == 14 and max(costs.values()) > 10 * min(costs.values()) >= 0
    worst = max(costs, key=lambda name: costs[name])
    alone = make("llama")
    with torch.no_grad():
        weight = alone.get_submodule(worst).weight
        weight.copy_(cq.quantize(weight, "int2", "g32", scale_dtype=torch.bfloat16).dequantize())
    assert kl(model, alone, ids[0]) == pytest.approx(costs[worst], rel=1e-3)


def test_a_cache_is_no_recipe_of_weights(make, ids) -> None:
    for call in (lambda: cq.sensitivity(make("llama"), "kv4", ids),
                 lambda: cq.mixed_precision(make("llama"), 4.5, ids, choices=("w4a16-g32", "kv4"))):  # fmt: skip
        with pytest.raises(CanopyError, match="kv4 leaves the weights as they are"):
            call()


def test_the_budget_is_kept_and_spent_where_it_helps(make, ids, tmp_path: Path) -> None:
    original, mixed, even = make("llama"), make("llama"), make("llama")
    recipe = cq.mixed_precision(mixed, 4.5, ids[:1], choices=CHOICES)
    report = cq.quantize_(mixed, recipe, method="gptq", calibration=ids)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    bits = sum(8 * layer.bytes_after for layer in report.layers) / weights
    assert 4.2 < bits <= 4.5 and recipe.name == "mixed-4.5"
    widths = {layer.scheme.format.bits for _, layer in quantized_layers(mixed)}
    assert len(widths) >= 2
    cq.quantize_(even, "w4a16-g32", method="gptq", calibration=ids)  # 4.5 bits everywhere
    assert kl(original, mixed, ids[1]) < 3 * kl(original, even, ids[1])
    cq.save(mixed, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert kl(mixed, loaded, ids[0]) < 1e-3


def test_a_large_budget_buys_the_best_everywhere(make, ids) -> None:
    recipe = cq.mixed_precision(make("llama"), 16, ids[:1], choices=CHOICES)
    schemes = {recipe.scheme_of(name).format.bits for name, _ in make("llama").named_modules() if "proj" in name}
    assert max(schemes) == 8 and 2 not in schemes


@pytest.mark.parametrize(
    ("budget", "choices", "words"),
    [
        (2.0, CHOICES, "w2a16-g32 alone takes 2.500 bits per weight, more than the budget of 2"),
        (4.0, CHOICES[:1], "two or more recipes for weights alone"),
        (4.0, ("w4a16", "w8a8"), "two or more recipes for weights alone"),
    ],
)
def test_what_cannot_be_searched(budget: float, choices: tuple[str, ...], words: str, make, ids) -> None:
    with pytest.raises(CanopyError) as error:
        cq.mixed_precision(make("llama"), budget, ids[:1], choices=choices)
    assert words in str(error.value)


def test_outlier_columns_stay_in_16_bits(make, ids, tmp_path: Path) -> None:
    original, plain, kept = make("llama"), make("llama"), make("llama")
    cq.quantize_(plain, "w4a4-g32", calibration=ids)
    report = cq.quantize_(kept, "w4a4-g32", method="outliers+gptq", calibration=ids)
    assert kl(original, kept, ids[0]) < 0.5 * kl(original, plain, ids[0])
    layers = [module for module in kept.modules() if isinstance(module, OutlierLinear)]
    assert len(layers) == 14 and all(len(layer.columns) == 1 for layer in layers)
    assert all("1 of" in layer.notes[0] and "kept in 16 bits" in layer.notes[0] for layer in report.layers)
    held = {
        name: layer.inner.quantized_weight for name, layer in kept.named_modules() if isinstance(layer, OutlierLinear)
    }
    assert report.layers[0].bytes_after == held[report.layers[0].name].nbytes + 2 * 128 + 8
    with pytest.raises(CanopyError, match="q_proj keeps some inputs in 16 bits"):
        cq.save(kept, tmp_path / "out")
