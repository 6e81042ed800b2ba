"""Rotations and rescalings that must not change what a model computes."""

from __future__ import annotations

import copy

import pytest
import torch

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.methods.equivalence import foldable, rescale
from canopyq.methods.rotation import random_rotation, rotate_
from canopyq.methods.structure import scale_pairs
from canopyq.methods.transaction import Transaction
from canopyq.nn.hadamard import hadamard, largest_power_of_two


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_hadamard_is_orthogonal_and_its_own_inverse(size: int) -> None:
    x = torch.randn(3, 128, dtype=torch.float64)
    y = hadamard(x, size)
    torch.testing.assert_close(hadamard(y, size), x)
    torch.testing.assert_close(y.norm(), x.norm())
    matrix = hadamard(torch.eye(size, dtype=torch.float64), size)
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, 3, 256])
def test_hadamard_refuses_other_sizes(size: int) -> None:
    with pytest.raises(CanopyError, match=f"size={size}"):
        hadamard(torch.zeros(2, 128), size)


@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize("size", [8, 12, 7, 96])
def test_random_rotation_is_orthogonal_for_any_size(size: int, keep_mean: bool) -> None:
    rotation = random_rotation(size, torch.Generator().manual_seed(0), keep_mean=keep_mean)
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    x = torch.randn(3, size, dtype=torch.float64)
    assert torch.allclose((x @ rotation).mean(1), x.mean(1)) == keep_mean
    assert largest_power_of_two(size) in (8, 4, 1, 32)


def test_a_rotation_in_blocks_keeps_to_them() -> None:
    rotation = random_rotation(96, torch.Generator().manual_seed(0), block=32)
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(96, dtype=torch.float64), atol=1e-12, rtol=0)
    inside = torch.block_diag(*[torch.ones(32, 32)] * 3).bool()
    assert (rotation[inside] != 0).all() and (rotation[~inside] == 0).all()
    assert not torch.equal(rotation[:32, :32], rotation[32:64, 32:64])


@torch.no_grad()
def test_a_rotation_in_blocks_leaves_the_logits(make, ids) -> None:
    model = make("llama tied")
    before, power = model(ids[0]).logits, model.model.embed_tokens.weight.reshape(-1, 4, 16).norm(dim=-1)
    with Transaction() as transaction:
        notes = rotate_(model, transaction, online=True, block=16)
    torch.testing.assert_close(model(ids[0]).logits, before, rtol=1e-4, atol=1e-4)
    after = model.model.embed_tokens.weight.reshape(-1, 4, 16).norm(dim=-1)
    torch.testing.assert_close(after, power, rtol=1e-4, atol=1e-5)  # nothing left its block
    assert any("in blocks of 16" in note for note in notes) and any("transform of 16" in note for note in notes)


def test_runs_that_do_not_divide_a_head_stay_in_the_blocks_of_all_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.block_diag(*[random_rotation(80, generator, block=32, keep_mean=mean) for mean in (False, True)])
    inside = torch.block_diag(*[torch.ones(32, 32)] * 5).bool()
    assert (rotation[~inside] == 0).all() and (rotation != 0).sum() == 160 * 16
    assert torch.equal(random_rotation(3, generator, block=2, keep_mean=True), torch.eye(3, dtype=torch.float64))


@torch.no_grad()
def test_the_report_of_a_rotation_says_how_far_each_part_was_turned(make, ids) -> None:
    model = make("qwen3 of small heads")
    before = model(ids[0]).logits
    with Transaction() as transaction:
        (note,) = (note for note in rotate_(model, transaction, block=16) if "residual" in note)
    torch.testing.assert_close(model(ids[0]).logits, before, rtol=1e-4, atol=1e-4)
    assert "96 in blocks of 16" in note and "24 in blocks of 8" in note


TURNED = ["llama", "llama tied", "mistral", "qwen2", "qwen3", "gemma", "mixtral", "gpt2", "opt", "phi3", "cohere",
          "falcon", "gpt_neox", "granite", "gpt_oss"]  # fmt: skip


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", TURNED)
@torch.no_grad()
def test_rotation_leaves_the_logits(name: str, online: bool, make, ids) -> None:
    model = make(name)
    before = model(ids[0]).logits
    loud, tied = _loudness(model, ids[0]), model.lm_head.weight is model.get_input_embeddings().weight
    with Transaction() as transaction:
        notes = rotate_(model, transaction, online=online)
    after = model(ids[0]).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert _loudness(model, ids[0]) < 0.7 * loud  # the loud channel is gone
    assert model.lm_head.weight is not model.get_input_embeddings().weight and not model.config.tie_word_embeddings
    assert any("at run time" in note for note in notes) == (online and name != "gpt_oss" and name != "mixtral")
    assert any("no longer shares" in note for note in notes) == tied


def _loudness(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The largest value of the embedded tokens over their root mean square."""
    x = model.get_input_embeddings()(ids)
    return float(x.abs().max() / x.square().mean().sqrt())


PAIRS = {  # of each block: norms with what reads them, and linear layers with nothing but products between
    **dict.fromkeys(["llama tied", "qwen2", "qwen3", "mistral", "gemma", "granite", "cohere", "phi3"], (2, 2)),
    "cohere": (1, 2), "gemma2": (2, 2), "olmo2": (0, 2), "bert": (0, 1), "gpt2": (2, 1), "gpt_neox": (2, 0),
    "falcon": (1, 1), "opt": (2, 2), "mixtral": (2, 4), "gpt_oss": (2, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_rescaling_every_pair_leaves_the_logits(name: str, make, ids) -> None:
    model = make(name)
    before, weights = model(ids[0]).logits, {name: value.clone() for name, value in model.state_dict().items()}
    found, _ = scale_pairs(model, "AWQ")
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]) and value.dtype == weights[key].dtype
    with Transaction() as transaction:
        for pairs in found.values():
            assert (sum(pair.is_norm for pair in pairs), sum(not pair.is_norm for pair in pairs)) == PAIRS[name]
            for pair in pairs:
                wished = torch.rand(len(pair.groups)) * 4 + 0.1
                scales, gain = foldable(pair, wished), pair.gain.clone()
                rescale(pair, scales, transaction)
                if pair.is_norm:
                    torch.testing.assert_close(scales.float(), wished, rtol=0.02, atol=0)
                    assert not torch.equal(pair.gain, gain)
                    assert torch.equal(pair.gain.to(torch.bfloat16).float(), pair.gain)
    torch.testing.assert_close(model(ids[0]).logits, before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_experts_without_a_gate_have_pairs(make, ids) -> None:
    model = make("nemotron_h")
    before, (found, left) = model(ids[0]).logits, scale_pairs(model, "AWQ")
    assert not left and any("experts" in name for pair in found["model.layers.0"] for name in pair.consumers)
    with Transaction() as transaction:
        for pair in (pair for own in found.values() for pair in own):
            rescale(pair, torch.rand(len(pair.groups)) + 0.5, transaction)
    torch.testing.assert_close(model(ids[0]).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "culprit"), [("gemma2", "post_attention_layernorm"), ("olmo2", "post_attention_layernorm"),
                          ("bert", "embeddings.LayerNorm"), ("roberta", "embeddings.LayerNorm"),
                          ("llava", "vision_tower")])  # fmt: skip
@torch.no_grad()
def test_rotation_refuses_a_stream_that_cannot_be_turned(name: str, culprit: str, make, ids) -> None:
    model = make(name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CanopyError, match=culprit), Transaction() as transaction:
        rotate_(model, transaction)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_gains_in_bfloat16_are_rounded_once(make) -> None:
    model = make("gemma").bfloat16()
    found, _ = scale_pairs(model, "AWQ")
    norms = [pair for own in found.values() for pair in own if pair.is_norm]
    assert len(norms) == 4
    for pair in norms:
        gain = pair.gain.copy_(torch.randn(len(pair.gain)) * 0.3).double() + 1
        scales = foldable(pair, torch.rand(len(gain)) * 4 + 0.1)
        with Transaction() as transaction:
            rescale(pair, scales, transaction)
        assert torch.equal(pair.gain, (gain / scales - 1).bfloat16())


class Halves(torch.nn.Module):
    """An MLP for text, and one for images that nothing calls on token ids, as in Ernie 4.5 VL."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.text, self.vision, self.seen = mlp, copy.deepcopy(mlp), "text"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.seen)(x)


@torch.no_grad()
def test_a_norm_that_an_uncalled_layer_may_read_is_left(make, ids) -> None:
    model = make("llama")
    for layer in model.model.layers:
        layer.mlp = Halves(layer.mlp)
    halves = [layer.mlp for layer in model.model.layers]

    def logits(seen: str) -> torch.Tensor:
        for half in halves:
            half.seen = seen
        return model(ids[0]).logits

    before = {seen: logits(seen) for seen in ("vision", "text")}
    found, left = scale_pairs(model, "AWQ")
    assert "vision" in left["model.layers.0.mlp.text.gate_proj"]
    with Transaction() as transaction:
        for pair in (pair for own in found.values() for pair in own):
            rescale(pair, torch.rand(len(pair.groups)) + 0.5, transaction)
    for seen in before:
        torch.testing.assert_close(logits(seen), before[seen], rtol=1e-4, atol=1e-4)


class Picky(torch.nn.Module):
    """An MLP that computes in bfloat16 alone, so that no trial in another dtype works."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            raise RuntimeError("this kernel knows bfloat16 alone")
        return self.inner(x)


def test_why_a_block_is_left_is_said(make, ids) -> None:
    model = make("llama").bfloat16()
    model.model.layers[1].mlp = Picky(model.model.layers[1].mlp)
    with pytest.raises(CanopyError, match=r"layers\.1: .*knows bfloat16 alone"), Transaction() as transaction:
        rotate_(model, transaction)
    report = cq.quantize_(model, "w4a16-g32", method="awq", calibration=ids)
    for layer in report.layers:
        assert any("knows bfloat16 alone" in note for note in layer.notes) == ("layers.1." in layer.name)


def test_models_without_blocks_or_pairs_are_refused() -> None:
    plain = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4))
    with pytest.raises(CanopyError, match="Sequential"):
        scale_pairs(plain, "AWQ")
