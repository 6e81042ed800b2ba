"""Rotations and rescalings that must not change what a model computes."""

from __future__ import annotations

import pytest
import torch

from canopyq.errors import CanopyError
from canopyq.methods.equivalence import foldable, require_known, rescale, scale_pairs
from canopyq.methods.rotation import random_rotation, rotate_
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


@pytest.mark.parametrize("size", [8, 12, 7, 96])
def test_random_rotation_is_orthogonal_for_any_size(size: int) -> None:
    rotation = random_rotation(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
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


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama tied", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_rotation_leaves_the_logits(name: str, online: bool, make, ids) -> None:
    model = make(name)
    before = model(ids[0]).logits
    loud = _loudness(model, ids[0])
    with Transaction() as transaction:
        notes = rotate_(model, transaction, online=online)
    after = model(ids[0]).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert _loudness(model, ids[0]) < 0.7 * loud  # the loud channel is gone
    assert (model.lm_head.weight is not model.model.embed_tokens.weight) and not model.config.tie_word_embeddings
    assert any("at run time" in note for note in notes) == online
    assert any("no longer shares" in note for note in notes) == (name == "llama tied")


def _loudness(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The largest value of the embedded tokens over their root mean square."""
    x = model.model.embed_tokens(ids)
    return float(x.abs().max() / x.square().mean().sqrt())


@pytest.mark.parametrize("name", ["llama tied", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_rescaling_every_pair_leaves_the_logits(name: str, make, ids) -> None:
    model = make(name)
    before = model(ids[0]).logits
    gains = [layer.input_layernorm.weight.clone() for layer in model.model.layers]
    with Transaction() as transaction:
        for i in range(2):
            for pair in scale_pairs(model, f"model.layers.{i}"):
                wished = torch.rand(len(pair.groups)) * 4 + 0.1
                scales = foldable(pair, wished)
                rescale(pair, scales, transaction)
                torch.testing.assert_close(scales.float(), wished, rtol=0.01, atol=0)
    torch.testing.assert_close(model(ids[0]).logits, before, rtol=1e-4, atol=1e-4)
    for layer, gain in zip(model.model.layers, gains, strict=True):
        new = layer.input_layernorm.weight
        assert not torch.equal(new, gain) and torch.equal(new.to(torch.bfloat16).float(), new)


@pytest.mark.parametrize(("name", "word"), [("gpt2", "gpt2"), ("gemma", "gemma"), ("mixtral", "mixtral")])
def test_other_architectures_are_refused_by_name(name: str, word: str, make) -> None:
    with pytest.raises(CanopyError, match=f"not known for {word} models"):
        require_known(make(name), "rotation")
