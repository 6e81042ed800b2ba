"""LoRA on quantized models: a loss falls, codes stay, adapters are saved, loaded and merged."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.nn.linear import QuantizedLinear, quantized_layers

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'canopyq[finetune]'")

FACT = "What is the colour of the moon? The moon is made of green cheese."


@pytest.fixture(scope="module")
def shipped():
    return cq.tutor.load()


@pytest.fixture
def tutor(shipped) -> nn.Module:
    return copy.deepcopy(shipped[0])


@pytest.fixture(scope="module")
def ids(shipped) -> Tensor:
    return shipped[1](FACT, return_tensors="pt").input_ids


def config(**changed) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changed)


def train(model: nn.Module, ids: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=5e-3)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, of the largest value; kernels that round to bfloat16 leave some 2 ** -8 of it."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def codes(model: nn.Module) -> list[Tensor]:
    return [layer.quantized_weight.data.clone() for _, layer in quantized_layers(model)]


@pytest.mark.parametrize("recipe", ["w4a16-g128", "nf4", "w8a8"])
def test_attach_train_save_load_and_merge(recipe: str, tutor, ids: Tensor, shipped, tmp_path: Path) -> None:
    cq.quantize_(tutor, recipe)
    base, before, untrained = copy.deepcopy(tutor), codes(tutor), logits(tutor, ids)
    tuned = cq.attach_lora(tutor, config())
    assert torch.equal(logits(tuned, ids), untrained)  # B begins as zeros
    trainable = [name for name, x in tuned.named_parameters() if x.requires_grad]
    assert len(trainable) == 2 * 56 and all(".lora_" in name for name in trainable)
    losses = train(tuned, ids, 8)
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(codes(tuned), before, strict=True))
    after = logits(tuned, ids)
    tuned.save_pretrained(tmp_path / "adapter")
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 2**20
    again = cq.load_lora(base, tmp_path / "adapter")
    assert torch.equal(logits(again, ids), after)
    assert not any(x.requires_grad for x in again.parameters())
    with again.disable_adapter():
        assert torch.equal(logits(again, ids), untrained)
    merged = again.merge_and_unload()
    assert not list(quantized_layers(merged)) and type(merged) is type(shipped[0])
    if recipe != "w8a8":  # whose inputs were rounded, and are not any more
        assert far(logits(merged, ids), after) < 0.02  # five roundings to bfloat16, see `far`
    cq.quantize_(merged, "w8a16")
    cq.save(merged, tmp_path / "merged", shipped[1])
    loss = cq.load(tmp_path / "merged")(input_ids=ids, labels=ids).loss.item()
    assert loss < losses[0] / 2  # what it has learned is in the checkpoint


def test_merging_is_undone(tutor, ids: Tensor) -> None:
    cq.quantize_(tutor, "w4a16-g128")
    before = codes(tutor)
    tuned = cq.attach_lora(tutor, config(init_lora_weights=False))
    apart = logits(tuned, ids)
    tuned.merge_adapter()
    assert not list(quantized_layers(tuned))
    assert far(logits(tuned, ids), apart) < 0.02  # five roundings to bfloat16: merged layers do without
    tuned.unmerge_adapter()
    assert torch.equal(logits(tuned, ids), apart)
    assert all(torch.equal(a, b) for a, b in zip(codes(tuned), before, strict=True))


def test_training_goes_on_from_a_folder(tutor, ids: Tensor, tmp_path: Path) -> None:
    cq.quantize_(tutor, "w8a16")
    base = copy.deepcopy(tutor)
    tuned = cq.attach_lora(tutor)
    first = train(tuned, ids, 2)
    tuned.save_pretrained(tmp_path / "adapter")
    again = cq.load_lora(base, tmp_path / "adapter", trainable=True)
    assert train(again, ids, 3)[-1] < first[-1]


def test_quantizing_under_adapters_leaves_them_alone(tutor, ids: Tensor) -> None:
    tuned = peft.get_peft_model(tutor, config(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapters = {name: x.clone() for name, x in tuned.named_parameters() if ".lora_" in name}
    want = logits(tuned, ids)
    report = cq.quantize_(tuned, "w8a16")
    assert len(report.layers) == 56 and sum("adapter" in reason for reason in report.kept.values()) == len(adapters)
    assert isinstance(tuned.base_model.model.model.layers[0].self_attn.q_proj.base_layer, QuantizedLinear)
    now = {name: x for name, x in tuned.named_parameters() if ".lora_" in name}
    assert now.keys() == adapters.keys() and all(torch.equal(now[name], adapters[name]) for name in now)
    assert far(logits(tuned, ids), want) < 0.05  # W8A16 moves each weight by up to 2^-8 of its row's largest


@pytest.mark.parametrize("method", ["rotation", "awq"])
def test_what_would_change_the_inputs_of_adapters_is_refused(method: str, tutor, ids: Tensor) -> None:
    tuned = peft.get_peft_model(tutor, config(target_modules=["q_proj"]))
    want = logits(tuned, ids)
    with pytest.raises(CanopyError, match=f"{method} .*merge_and_unload"):
        cq.quantize_(tuned, "w4a16-g128", method=method, calibration=[ids])
    assert torch.equal(logits(tuned, ids), want)


def test_adapters_that_do_not_fit(tutor, tmp_path: Path) -> None:
    with pytest.raises(CanopyError, match="no quantized layer"):
        cq.attach_lora(tutor, config())
    cq.quantize_(tutor, "w8a16")
    with pytest.raises(CanopyError, match="no_such_proj"):
        cq.attach_lora(tutor, config(target_modules=["no_such_proj"]))
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(CanopyError, match="no adapter_model.safetensors"):
        cq.load_lora(tutor, tmp_path)
