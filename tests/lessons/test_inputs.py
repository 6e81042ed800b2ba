"""The inputs of one layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from canopyq.lessons import inputs_of


def test_all_tokens_of_all_batches_in_order_and_no_hook_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    batches = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8]])
    found = inputs_of(model, "2", *batches)
    expected = model[1](model[0](torch.arange(1, 9)))
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad and not model[2]._forward_pre_hooks


def test_the_hook_goes_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        inputs_of(model, "1", torch.tensor([[1]]))
    assert not model[1]._forward_pre_hooks
