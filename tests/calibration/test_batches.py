"""Calibration data of every kind, and of the wrong ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import canopyq as cq
from canopyq.calibration.data import read_batches
from canopyq.errors import CanopyError


class Words:
    """A tokenizer that gives each word its length as an id."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


class Model(nn.Module):
    def __init__(self, vocabulary: int = 20, context: int | None = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 4)
        self.config = type("Config", (), {"max_position_embeddings": context})

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed


IDS = torch.arange(6).reshape(2, 3)


def test_token_ids_and_masks() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    plain, masked = read_batches([IDS.int(), {"input_ids": IDS, "attention_mask": mask}], Model())
    assert torch.equal(plain.ids, IDS) and plain.ids.dtype == torch.int64 and bool(plain.real.all())
    assert torch.equal(masked.real, mask.bool()) and torch.equal(masked.arguments["attention_mask"], mask)
    assert set(plain.arguments) == {"input_ids"}
    [single] = read_batches(IDS, Model())
    assert torch.equal(single.ids, IDS)


def test_texts_are_cut_and_padded_at_the_right() -> None:
    texts = ["a bb ccc", "a", "a bb ccc dddd a a a a a a a a"]
    [batch] = read_batches(texts, Model(), Words())
    assert batch.ids.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 1, 1, 1, 1]]
    assert batch.real.sum(1).tolist() == [1, 3, 8]
    [cut] = read_batches(texts[::2], Model(), Words(), length=3)
    assert cut.ids.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert len(read_batches(["a bb"] * 20, Model(), Words())) == 3


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "calibration data is empty"),
        (iter(()), {}, "calibration data is empty"),
        (["text", IDS], {"tokenizer": Words()}, "is 'text'"),
        (["text"], {}, "texts.* no tokenizer"),
        (["a", " "], {"tokenizer": Words()}, "calibration text 1 is empty"),
        (["a a a", "a a"], {"tokenizer": Words(), "length": 3}, "text 1 has 2 tokens, fewer than 3"),
        (["a a a"], {"tokenizer": Words(), "length": 9}, "length=9 .* to 8"),
        ([IDS + 15], {}, "token 20.*vocabulary of 20"),
        ([IDS - 1], {}, "token -1"),
        (["a" * 30], {"tokenizer": Words()}, "token 30.*vocabulary of 20"),
        ([IDS.repeat(1, 3)], {}, "9 tokens.*the model takes 8"),
        ([{"input_ids": IDS, "attention_mask": torch.zeros(2, 3)}], {}, "all padding"),
    ],
)
def test_data_that_does_not_fit(data: object, options: dict, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        read_batches(data, Model(), **options)


def test_a_model_that_says_nothing_of_itself_takes_any_ids() -> None:
    assert int(read_batches([IDS + 1000], nn.Sequential(nn.Embedding(1, 1)))[0].ids.max()) == 1005


def test_texts_go_through_quantize() -> None:
    from tests.model.test_architectures import make

    report = cq.quantize_(make("llama"), "w4a16-g128", calibration=["a bb ccc a", "dddd a a"], tokenizer=Words())
    assert all(0 < layer.output_error < 0.5 for layer in report.layers)
