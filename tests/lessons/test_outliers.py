"""Outlier channels: the exaggeration changes no bit of the logits, and every layer's inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.lessons.outliers import exaggerate_, norm_pairs, salient, spread


@pytest.fixture(scope="module")
def tutor() -> nn.Module:
    return cq.tutor.load()[0]


def inputs_of(model: nn.Module, layer: str, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.parametrize("factor", [64.0, 2.0, 2.0**-5, 4096.0])
def test_the_logits_stay_the_same_to_the_last_bit(tutor: nn.Module, factor: float) -> None:
    ids = torch.randint(5, 1280, (2, 50), generator=torch.Generator().manual_seed(0))
    changed = exaggerate_(copy.deepcopy(tutor), [3, 200], factor)
    with torch.inference_mode():
        assert torch.equal(tutor(ids).logits, changed(ids).logits)
    layer = "model.layers.4.self_attn.q_proj"
    before, after = inputs_of(tutor, layer, ids), inputs_of(changed, layer, ids)
    others = [i for i in range(256) if i not in (3, 200)]
    assert torch.equal(after[:, [3, 200]], factor * before[:, [3, 200]])
    assert torch.equal(after[:, others], before[:, others])


def test_the_tutor_quantized_to_8_bit_activations_per_tensor_suffers(tutor: nn.Module) -> None:
    """What the exaggeration is for: one scale a tensor no longer reaches the other channels."""
    ids = torch.randint(5, 1280, (2, 50), generator=torch.Generator().manual_seed(0))
    layer = "model.layers.4.self_attn.q_proj"
    errors = []
    for model in (tutor, exaggerate_(copy.deepcopy(tutor), [3], 256.0)):
        x, weight = inputs_of(model, layer, ids), model.get_submodule(layer).weight.detach()
        y = x @ weight.T
        errors.append(((cq.quantize(x, "int8", "tensor").dequantize() @ weight.T - y).norm() / y.norm()).item())
    assert errors[1] > 8 * errors[0]


def test_every_norm_but_the_last_is_found(tutor: nn.Module) -> None:
    found = norm_pairs(tutor)
    assert len(found) == 16 and [len(pair.consumers) for pair in found[:2]] == [3, 2]


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.floats(0.01, 1))
def test_the_salient_are_the_largest(values: list[float], share: float) -> None:
    magnitude = torch.tensor(values)
    index = salient(magnitude, share)
    assert 1 <= len(index) <= max(1, round(share * len(values)))
    rest = torch.ones(len(values), dtype=torch.bool)
    rest[index] = False
    assert not bool(rest.any()) or magnitude[index].min() >= magnitude[rest].max()


def test_spread_is_largest_over_median() -> None:
    assert spread(torch.tensor([1.0, 2.0, 3.0, 2.0, 100.0])) == 50.0
    assert spread(torch.zeros(4)) == 0.0


def test_mistakes_are_named_and_change_nothing(tutor: nn.Module) -> None:
    model = copy.deepcopy(tutor)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for channels, factor, message in [
        ([0], 3.0, "use a power of two"),
        ([256], 2.0, "channels=256 .* to 255"),
    ]:
        with pytest.raises(CanopyError, match=message):
            exaggerate_(model, channels, factor)
    with pytest.raises(CanopyError, match="Linear has no embedding"):
        exaggerate_(nn.Linear(4, 4), [0], 2.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    cq.quantize_(model, "w8a16")
    with pytest.raises(CanopyError, match="quantized already"):
        exaggerate_(model, [0], 2.0)
    with pytest.raises(CanopyError, match="share="):
        salient(torch.ones(4), 0.0)


def test_norms_that_add_one_are_refused() -> None:
    """Gemma multiplies by 1 + weight: to multiply the weight would change the model."""
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                         intermediate_size=64, vocab_size=50)  # fmt: skip
    with pytest.raises(CanopyError, match="GemmaForCausalLM .* add to their gain"):
        exaggerate_(GemmaForCausalLM(config), [0], 2.0)
