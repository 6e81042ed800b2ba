"""What the tests of checkpoints share: tiny random models, and their answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import canopyq as cq
from canopyq.tensor.scheme import Recipe

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = torch.arange(3, 51).reshape(2, 24)
CALIBRATION = [torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(0))]


def _llama(dtype: torch.dtype = torch.bfloat16, **changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return _cast(LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval(), dtype)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters alone, as `from_pretrained` does: no file holds the rotary frequencies, which stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits.float()


@pytest.fixture(scope="session")
def llama() -> Callable[..., nn.Module]:
    """A function of a dtype and changes to the config that makes a tiny random Llama, always the same one."""
    return _llama


@pytest.fixture(scope="session")
def cast() -> Callable[[nn.Module, torch.dtype], nn.Module]:
    """A function that casts a model's parameters."""
    return _cast


@pytest.fixture(scope="session")
def logits() -> Callable[[nn.Module], Tensor]:
    """What a model answers to a fixed batch of tokens."""
    return _logits


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function of a recipe: the folder of the tiny Llama saved in it, to read from and never to change."""
    folders: dict[str, Path] = {}

    def save(recipe: str) -> Path:
        if recipe not in folders:
            model = _llama()
            cq.quantize_(model, recipe, calibration=CALIBRATION if Recipe.parse(recipe).static else None)
            folders[recipe] = tmp_path_factory.mktemp("saved") / recipe
            cq.save(model, folders[recipe], check=False)
        return folders[recipe]

    return save
