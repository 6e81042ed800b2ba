"""`quantize_`: all or nothing, nothing left out of the report, and bytes that are really counted."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from canopyq.calibration.calibrate import Calibration, calibrate
from canopyq.calibration.static_range import static_scale
from canopyq.errors import CanopyError
from canopyq.memory import bytes_held
from canopyq.model.quantize import plan, quantize_
from canopyq.nn.linear import QuantizedLinear, quantized_layers
from canopyq.tensor.quantized_tensor import quantize, sqnr_db
from canopyq.tensor.scheme import RECIPES, Recipe, Scheme


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, 128),
        nn.LayerNorm(128),
        nn.Linear(128, 256),
        nn.GELU(),
        nn.Linear(256, 128, bias=False),
    )


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
        vocab_size=96, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) or after[name].isnan().any() for name in before)


TOKENS = torch.arange(24).reshape(2, 12)


def data_for(recipe: str) -> list[Tensor] | None:
    """Calibration data, if the recipe needs it."""
    return [TOKENS] if Recipe.parse(recipe).static else None


# What it does ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_quantizes_a_llama(recipe: str) -> None:
    model, original = llama(), llama()
    weights = {name: m.weight for name, m in original.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    report = quantize_(model, recipe, calibration=data_for(recipe))
    assert [layer.name for layer in report.layers] == list(weights) and len(weights) == 14
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear) and not layer.training
        shared = layer.quantized_weight.global_scale  # of layers that are computed as one
        expected = quantize(weight, Recipe.parse(recipe).weights, global_scale=shared)
        assert torch.equal(layer.quantized_weight.dequantize(), expected.dequantize())
    assert model(TOKENS).logits.isfinite().all()


def test_the_model_computes_with_the_dequantized_weights() -> None:
    model, by_hand = llama(), llama()
    quantize_(model, "w4a16-g32")
    with torch.no_grad():
        for name, module in by_hand.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(quantize(module.weight, Recipe.parse("w4a16-g32").weights).dequantize())
        got, expected = model(TOKENS).logits, by_hand(TOKENS).logits
    assert float((got - expected).norm() / expected.norm()) < 4e-3  # few tokens: the kernel rounds inputs to bfloat16


@pytest.mark.parametrize("recipe", ["w8a16+head", "w4a16-channel+head", "w8a8+head", "w8a8-asym+head", "fp8+head"])
def test_a_batch_generates_what_its_rows_do(recipe: str) -> None:
    """transformers gives the head the last token of each row, which do not lie together."""
    model = llama()
    quantize_(model, recipe)
    model.generation_config.pad_token_id = 0
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    both = torch.stack(model.generate(TOKENS, **options).logits, dim=1)
    alone = [torch.stack(model.generate(row[None], **options).logits, dim=1) for row in TOKENS]
    # Two rows take another kernel than one: one of them rounds inputs to bfloat16, steps of 2^-8 at logits of size 1.
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=0.02)


@pytest.mark.parametrize("recipe", ["w4a16-g32+head+embed", "w8a8+head"])
def test_a_cold_model_is_exported_for_any_length_and_stays_as_it_was(recipe: str) -> None:
    model = llama()
    quantize_(model, recipe)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}, "use_cache": None}
        graph = torch.export.export(model, (), {"input_ids": TOKENS, "use_cache": False}, dynamic_shapes=shapes)
        for name, buffer in model.named_buffers():
            assert type(buffer) is Tensor and torch.equal(buffer, before[name]), name
        for length in (5, 12, 40):  # a graph computes on the weight as it lies, a layer may round to bfloat16: 2^-8
            ids = torch.arange(2 * length).reshape(2, length)
            torch.testing.assert_close(
                graph.module()(input_ids=ids, use_cache=False).logits, model(ids).logits, rtol=0, atol=0.02
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_quantized_model_may_change_its_dtype(dtype: torch.dtype) -> None:
    model = llama()
    quantize_(model, "nvfp4")
    before = model.model.layers[0].mlp.up_proj.quantized_weight.dequantize(torch.float32)
    model.to(dtype)
    assert model(TOKENS).logits.dtype == dtype
    assert torch.equal(model.model.layers[0].mlp.up_proj.quantized_weight.dequantize(torch.float32), before)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_stays_and_stays_tied(tied: bool) -> None:
    model = llama(tied)
    report = quantize_(model, "w4a16-g32")
    assert isinstance(model.lm_head, nn.Linear)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert report.kept["lm_head"] == "named in the recipe's ignore list"
    for other in (copy.deepcopy(model), model.to(torch.bfloat16)):
        assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


def test_deep_copies_and_state_dicts_carry_the_codes() -> None:
    model = llama()
    quantize_(model, "w4a16-g32")
    logits = model(TOKENS).logits
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, logits)
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    quantize_(other, "w4a16-g32")
    assert not torch.equal(other(TOKENS).logits, logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS).logits, logits)


def test_training_mode_is_kept() -> None:
    model = small().train()
    model[4].eval()
    quantize_(model, "w8a16")
    assert model[2].training and not model[4].training


def test_biases_are_the_same_parameters() -> None:
    model = small()
    bias = model[2].bias
    quantize_(model, "w4a16-g128")
    assert model[2].bias is bias and model[4].bias is None


def test_a_layer_used_twice_stays_one_layer() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second = self.first
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64))] * 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](self.second(self.first(x))))

    model = Shared()
    report = quantize_(model, "w4a16-g32")
    assert model.first is model.second and isinstance(model.second, QuantizedLinear)
    assert model.blocks[0] is model.blocks[1] and isinstance(model.blocks[1][0], QuantizedLinear)
    assert len(report.layers) == 2
    assert model(torch.randn(3, 64)).shape == (3, 64)


# The report -----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_model() -> None:
    model = llama()
    before = bytes_held(model)
    report = quantize_(model, "w4a16-g32")
    assert report.bytes_before == before and report.bytes_after == bytes_held(model)
    saved = sum(layer.bytes_before - layer.bytes_after for layer in report.layers)
    assert report.bytes_before - report.bytes_after == saved
    for layer in report.layers:
        n = layer.shape[0] * layer.shape[1]
        assert layer.bytes_before == 4 * n and layer.bytes_after == n // 2 + n // 32 * 2
        assert layer.bits_per_weight == 4.5


def test_bytes_before_count_a_view_as_what_it_shows() -> None:
    model, base = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)), torch.randn(16, 64)
    model[0].weight, model[1].weight = nn.Parameter(base[:8]), nn.Parameter(base[8:])
    report = quantize_(model, "w8a16")
    assert [layer.bytes_before for layer in report.layers] == [2048, 2048] and report.bytes_before == 4096


class Everything(nn.Module):
    """A module of every kind that holds a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.fc = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.conv = nn.Conv1d(32, 32, 3)
        self.attention = nn.MultiheadAttention(32, 2)
        self.rnn = nn.GRU(32, 32)
        self.experts = nn.ParameterList([torch.randn(4, 32, 32)])
        self.odd = type("OddLinear", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})(32, 32)
        self.lm_head = nn.Linear(32, 10)
        self.act = nn.GELU()


def test_nothing_that_holds_a_weight_is_left_out() -> None:
    model = Everything()
    held = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    report = quantize_(model, "w4a16-g32")
    assert {layer.name for layer in report.layers} == {"fc"}
    assert set(report.kept) == held - {"fc"}
    reasons = {
        "embed": "an embedding",
        "norm": "a norm",
        "conv": "a Conv1d: only plain nn.Linear",
        "attention": "a MultiheadAttention: only plain nn.Linear",
        "attention.out_proj": "MultiheadAttention computes with its weight itself",
        "rnn": "a GRU: only plain nn.Linear",
        "odd": "a OddLinear: only plain nn.Linear",
        "lm_head": "named in the recipe's ignore list",
    }
    for name, reason in reasons.items():
        assert report.kept[name].startswith(reason)
    x = torch.randn(2, 1, 32)
    assert model.attention(x, x, x)[0].isfinite().all()


def test_ignored_parts_of_names_are_kept() -> None:
    model = llama()
    recipe = Recipe("mine", Scheme("int4", "g32"), ignore=("lm_head", "layers.1.mlp", "q_proj"))
    report = quantize_(model, recipe)
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"k_proj", "v_proj", "o_proj", "gate_proj",
                                                                          "up_proj", "down_proj"}  # fmt: skip
    assert len(report.layers) == 14 - 3 - 2
    assert isinstance(model.model.layers[1].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("act", [quantize_, plan], ids=["quantize_", "plan"])
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"ignore": ("lm_head", "layers.1.mpl")}, ["'layers.1.mpl'", "'layers.1.mlp'"]),
        ({"ignore": "down_poj"}, ["'down_poj'", "'down_proj'"]),
        ({"ignore": "zzz"}, ["'zzz'", "print(model)"]),
        ({"exceptions": (("layers.1.mlp.dwn_proj", Scheme("int8")),)}, ["'layers.1.mlp.dwn_proj'", "down_proj"]),
        ({"exceptions": (("lm_head", Scheme("int8")),)}, ["'lm_head'", "ignore list"]),
        ({"exceptions": (("norm", Scheme("int8")),)}, ["'norm'", "a vector"]),
        ({"exceptions": (("mlp", Scheme("int8")), ("mlp.up_proj", Scheme("int2")))}, ["'mlp.up_proj'", "after 'mlp'"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_a_recipe_names_has_to_exist(act, options: dict, parts: list[str]) -> None:
    model = llama()
    before = state(model)
    with pytest.raises(CanopyError) as refused:
        act(model, Recipe("mine", Scheme("int4", "g32"), **options))
    assert all(part in str(refused.value) for part in parts) and "\n" not in str(refused.value)
    assert_untouched(model, before)


def test_a_shared_layer_is_kept_by_any_of_its_names() -> None:
    model = small()
    model.append(model[4])
    assert "4" in plan(model, Recipe("mine", Scheme("int4", "g32"), ignore="5")).kept
    exception = Recipe("mine", Scheme("int4", "g32"), exceptions=(("5", Scheme("int8", "g32")),))
    layers = plan(model, exception).layers  # as many weights and scales, and half a byte more a code
    assert layers["4"][2] == layers["2"][2] + 128 * 256 // 2


@pytest.mark.parametrize(("recipe", "part"), [("nf4", "nf4"), ("w4a16-g32+kv4", "+kv4"), ("w8a16+kv-fp8", "+kv-fp8")])
def test_what_no_file_holds_is_said_before_and_after(recipe: str, part: str) -> None:
    model = llama()
    for text in (str(plan(model, recipe)), str(quantize_(model, recipe))):
        assert sum(part in line for line in text.splitlines()[1:]) == 1
    assert not plan(llama(), "w4a16-g32").notes and not quantize_(small(), recipe.split("+")[0]).notes


def test_the_text_says_it_all() -> None:
    report = quantize_(small(), "w4a16-g128")
    text = str(report)
    assert "w4a16-g128: 2 linear layers quantized, 4.125 bits per weight; model 290 kB -> 61.4 kB" in text
    assert "noisiest: " in text and "kept: 0 (an embedding" in text and "kept: 1 (a norm" in text
    assert report._repr_html_().startswith("<pre>")
    assert [layer.sqnr_db for layer in report.worst] == sorted(layer.sqnr_db for layer in report.layers)


def test_sqnr_by_hand() -> None:
    x = torch.tensor([[3.0, -1.0, 0.4, 0.0]])
    q = quantize(x, "int2", "tensor", restricted=True)  # scale 3: codes 1, 0, 0, 0
    assert sqnr_db(x, q.dequantize()) == pytest.approx(10 * torch.log10(torch.tensor(10.16 / 1.16)).item(), abs=1e-6)
    assert sqnr_db(x, quantize(x, "fp32").dequantize()) == float("inf")
    assert sqnr_db(torch.zeros(2, 2), quantize(torch.zeros(2, 2), "int4").dequantize()) == float("inf")


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_a_bit_is_worth_six_decibels(bits: int) -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    more, fewer = (sqnr_db(x, quantize(x, f"int{b}", "channel").dequantize()) for b in (bits, bits - 1))
    gain = more - fewer
    assert 5.0 < gain < 7.5


# All or nothing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bad_value_in_the_last_layer_leaves_all_as_it_was(recipe: str, bad: float) -> None:
    model = small()
    with torch.no_grad():
        model[4].weight[127, 255] = bad
    before = state(model)
    with pytest.raises(CanopyError, match=r"^4: .*holds . NaN and . infinite values"):
        quantize_(model, recipe, calibration=data_for(recipe))
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("last", "recipe", "message"),
    [
        (nn.Linear(128, 8, device="meta"), "w4a16-g128", "^2: .*meta tensor.*load"),
        (nn.Linear(128, 8, dtype=torch.complex64), "w8a16", "^2: .*complex64"),
        (nn.LazyLinear(8), "w8a16", "^2 has no weights yet; call the model once"),
    ],
    ids=["meta", "complex", "lazy"],
)
def test_a_last_layer_that_does_not_fit_leaves_all_as_it_was(last: nn.Linear, recipe: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), last)
    first = model[0]
    with pytest.raises(CanopyError, match=message):
        quantize_(model, recipe)
    assert model[0] is first and model[2] is last


@pytest.mark.parametrize(
    ("width", "recipe", "reason"),
    [(100, "w4a16-g128", "128 does not fit.*use g100"), (16, "mxfp4", "blocks of 32")],
    ids=["group", "block"],
)
def test_a_layer_that_groups_do_not_fit_stays_with_its_reason(width: int, recipe: str, reason: str) -> None:
    """Gemma 3n has matrices of rank 64 beside large ones."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(width, 8))

    kept = quantize_(small := model(), recipe).kept
    assert re.search(reason, kept["2"]) and type(small[2]) is nn.Linear and isinstance(small[0], QuantizedLinear)
    assert plan(model(), recipe).kept == kept
    with pytest.raises(CanopyError, match=f"^strict: 2 .*{reason}"):
        quantize_(model(), recipe, strict=True)
    with pytest.raises(CanopyError, match=f"^2: .*{reason}"):  # who names it in an exception means it
        scheme = Recipe.parse(recipe).weights
        quantize_(model(), Recipe("mine", Scheme("int8"), exceptions=(("2", scheme),)))
    with pytest.raises(CanopyError, match=f"no linear layer left.*1 is kept.*{reason}"):
        quantize_(nn.Sequential(nn.ReLU(), nn.Linear(width, 8)), recipe)


@pytest.mark.parametrize(
    "change",
    [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), nn.utils.parametrizations.weight_norm,
     nn.utils.parametrizations.spectral_norm, lambda layer: nn.utils.spectral_norm(layer)],
    ids=["pruned", "weight norm", "spectral norm", "old spectral norm"],
)  # fmt: skip
def test_a_weight_that_is_computed_for_each_call_stays(change: Callable[[nn.Module], nn.Module]) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), change(nn.Linear(64, 64))).eval(), torch.randn(2, 64)
    expected = model[1](x)
    with pytest.warns(UserWarning, match="only 50 %"):
        kept = quantize_(model, "w8a16").kept
    assert "make it a plain one first" in str(kept) and torch.equal(model[1](x), expected)


def test_subclasses_of_linear_that_do_the_same_are_quantized() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    class Same(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    model = nn.Sequential(FalconLinear(64, 64), Same(64, 64), Other(8, 8))
    report = quantize_(model, "w8a16")
    assert [layer.name for layer in report.layers] == ["0", "1"] and "Other" in report.kept["2"]


def test_a_frozen_weight_in_a_buffer_is_quantized_beside_its_bias() -> None:
    layer = nn.Linear(64, 64)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    model, bias = nn.Sequential(layer), layer.bias
    quantize_(model, "w8a16")
    assert isinstance(model[0], QuantizedLinear) and torch.equal(model[0].bias, bias)


def test_a_small_share_is_said_in_the_first_line() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Conv1d(64, 64, 3), nn.Embedding(9999, 64))

    with pytest.warns(UserWarning, match="only 25 %"):
        report = quantize_(model(), "w8a16")
    assert report.share == plan(model(), "w8a16").share == 0.25
    for said in (report, plan(model(), "w8a16")):
        assert "only 25 %" in str(said).splitlines()[0]
    whole = quantize_(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), "w8a16")
    assert whole.share == 1 and "only" not in str(whole)


def test_a_second_time_is_refused() -> None:
    model = small()
    quantize_(model, "w8a16")
    codes = model[2].weight.clone()
    with pytest.raises(CanopyError, match="2 is quantized already; start from a freshly loaded model"):
        quantize_(model, "w4a16-g32")
    assert torch.equal(model[2].weight, codes)


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        (nn.Sequential(nn.LayerNorm(4)), "w8a16", "Sequential has no linear layer left"),
        (nn.ModuleDict({"lm_head": nn.Linear(4, 4)}), "w8a16", "ModuleDict has no linear layer left"),
        (nn.Linear(4, 4), "w8a16", "bare Linear.*use QuantizedLinear.from_linear"),
        (QuantizedLinear.from_linear(nn.Linear(4, 4), Scheme("int8")), "w8a16", "the model is quantized already"),
        (nn.Sequential(nn.Linear(4, 4)), "w4b16", "unknown recipe 'w4b16'; did you mean"),
    ],
    ids=["no linear", "only the head", "bare linear", "bare quantized", "unknown recipe"],
)
def test_what_cannot_be_quantized(model: object, recipe: str, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        quantize_(model, recipe)  # type: ignore[arg-type]


# Activations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_come_from_the_calibration(observer: str, symmetric: bool) -> None:
    model, original = llama(), llama()
    inputs = Scheme("int8", "tensor", symmetric, observer=observer, scale_dtype=torch.bfloat16)
    recipe = Recipe("mine", Scheme("int8", "channel", scale_dtype=torch.bfloat16), activations=inputs, static=True)
    planned = plan(model, recipe)
    report = quantize_(model, recipe, calibration=[TOKENS, TOKENS + 30])
    assert planned.bytes_after == report.bytes_after == bytes_held(model)
    assert all(0 < layer.output_error < 0.6 for layer in report.layers)
    assert "ranges" in str(report) and "4 samples" in str(report)
    seen = calibrate(original, [TOKENS, TOKENS + 30])
    for name, layer in quantized_layers(model):
        scale, zero_point = static_scale(seen[name], inputs)
        assert torch.equal(layer.input_scale, scale)
        assert zero_point is layer.input_zero_point is None or torch.equal(layer.input_zero_point, zero_point)


def test_a_calibration_serves_many_recipes() -> None:
    seen = calibrate(llama(), [TOKENS])
    for recipe in ("w8a8-static", "fp8-static", "w8a8-static-asym", "w4a8-g64-static", "w8a8"):
        model = llama()
        report = quantize_(model, recipe, calibration=seen)
        assert all(layer.output_error is None for layer in report.layers)
        assert bool(report.notes) == recipe.endswith(("static", "asym"))
        assert model(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("recipe", ["w8a8-static", "fp8-static"])
def test_experts_have_ranges_of_their_own(recipe: str) -> None:
    from tests.model.test_architectures import make

    model = make("mixtral")
    data = [torch.randint(3, 96, (4, 40), generator=torch.Generator().manual_seed(0))]
    quantize_(model, recipe, calibration=data)
    scales = {name: float(layer.input_scale) for name, layer in quantized_layers(model)}
    downs = [scale for name, scale in scales.items() if ".experts." in name and "down_proj" in name]
    assert len(downs) == 8 and len(set(downs)) > 4
    assert model(data[0]).logits.isfinite().all()


def test_the_reports_of_thin_data_say_so() -> None:
    with pytest.warns(UserWarning, match="one sample"):
        report = quantize_(llama(), "w8a8-static", calibration=[TOKENS[:1]])
    assert "thin" in str(report)


def test_massive_inputs_are_named_with_their_cure() -> None:
    seen, name = calibrate(llama(), [TOKENS]), "model.layers.1.mlp.down_proj"
    seen[name].histogram.counts *= 10  # of so many values the largest is one in more than 10,000
    seen[name].histogram.add(torch.tensor([1e4]))
    seen[name].ranges[0, 1] = 1e4
    with pytest.warns(UserWarning, match=f"{name} .*smoothquant.* w8a8,.*ignore") as caught:
        report = quantize_(llama(), "w8a8-static", calibration=seen)
    assert str(caught[0].message) in report.notes and "\n" not in str(caught[0].message)


def nan_norm(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.nan


@pytest.mark.parametrize(
    ("recipe", "data", "spoil", "message"),
    [
        ("w8a8-static", None, None, "w8a8-static fixes the range of activations beforehand and needs calibration data"),
        ("w8a8-static", [], None, "calibration data is empty"),
        ("fp8-static", [TOKENS + 80], None, "token 103.*vocabulary of 96"),
        ("w8a8-static", [TOKENS], nan_norm, r"layers\.1\.self_attn\.q_proj: its inputs hold \d+ NaN"),
        ("w8a8-static", Calibration(1, 1, True), None, "q_proj has no input range: it was not calibrated; give more"),
        ("w8a8-static", ["text"], None, "texts.*no tokenizer"),
    ],
    ids=["no data", "empty", "another tokenizer", "NaN", "another model's", "no tokenizer"],
)
def test_static_activations_without_good_data_leave_all_as_it_was(
    recipe: str, data: object, spoil: object, message: str
) -> None:
    model = llama()
    if spoil is not None:
        spoil(model)
    before = state(model)
    with pytest.raises(CanopyError, match=message):
        quantize_(model, recipe, calibration=data)
    assert_untouched(model, before)


def test_statistics_of_another_shape_are_refused() -> None:
    seen = calibrate(llama(), [TOKENS])
    for name in list(seen):
        seen[name] = dataclasses.replace(seen[name], lo=seen[name].lo[:-1])
    with pytest.raises(CanopyError, match="takes 128 features and was calibrated with 127; calibrate this model"):
        quantize_(llama(), "w8a8-static", calibration=seen)


def test_a_layer_that_no_token_reaches_has_no_static_range() -> None:
    model = llama()
    model.spare = nn.Linear(128, 128)
    before = state(model)
    with pytest.raises(CanopyError, match="spare has no input range: the model never called it"):
        quantize_(model, "w8a8-static", calibration=[TOKENS])
    assert_untouched(model, before)


def test_hooks_stay_on_their_layer_and_can_be_taken_off() -> None:
    model, seen = llama(), []
    layer = model.model.layers[0].mlp.up_proj
    handles = [layer.register_forward_hook(lambda *given: seen.append("after")),
               layer.register_forward_pre_hook(lambda *given: seen.append("before"))]  # fmt: skip
    quantize_(model, "w8a16")
    model(TOKENS)
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    model(TOKENS)
    assert seen == ["before", "after"] and len(dict(quantized_layers(model))) == 14


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ignore": ("lm_hed",)}, ("'lm_hed'", "'lm_head'")),
        ({"exceptions": (("down_prj", Recipe.parse("w8a16").weights),)}, ("'down_prj'", "'down_proj'")),
    ],
    ids=["ignore", "exceptions"],
)
def test_a_pattern_that_fits_nothing_is_named_with_the_nearest(changed: dict, named: tuple[str, str]) -> None:
    from tests.model.test_architectures import make

    model = make("llama")
    with pytest.raises(CanopyError) as error:
        quantize_(model, dataclasses.replace(Recipe.parse("w4a16-g32"), **changed))
    assert all(name in str(error.value) for name in named)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
