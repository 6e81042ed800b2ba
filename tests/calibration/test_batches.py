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


class Nano(nn.Module):
    """As nanoGPT writes it: a config of its own, and ids by place."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("GPTConfig", (), {"block_size": 16, "n_embd": 8})()
        self.wte, self.blocks = nn.Embedding(20, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.shared: dict[int, torch.Tensor] = {}

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.wte(idx)
        for block in self.blocks:
            x = block(x)
        return x


class Sharing(Nano):
    """Later blocks take what the first left beside its output, as those of Gemma 4 take keys."""

    class Block(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number, self.linear = number, nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, shared: dict[str, torch.Tensor]) -> torch.Tensor:
            if self.number == 0:
                shared["keys"] = self.linear(x)
            return x + shared["keys"]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Sharing.Block(number) for number in range(2))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x, shared = self.wte(idx), {}
        for block in self.blocks:
            x = block(x, shared)
        return x


def test_models_that_are_not_of_transformers() -> None:
    assert cq.calibrate(Nano(), [IDS]).by_blocks
    assert not cq.calibrate(Sharing(), [IDS]).by_blocks


def test_further_inputs_reach_the_model_or_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **sizes))
    answers = torch.arange(10).reshape(2, 5)
    seen = cq.calibrate(t5, [{"input_ids": IDS, "decoder_input_ids": answers, "labels": answers}])
    assert seen["decoder.block.0.layer.0.SelfAttention.q"].tokens == 10
    assert seen["decoder.block.0.layer.1.EncDecAttention.k"].tokens == 6
    with pytest.raises(CanopyError, match="T5ForConditionalGeneration does not run"):
        cq.calibrate(t5, [IDS])

    llama = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                         num_attention_heads=2, **sizes))  # fmt: skip
    packed = {"input_ids": IDS.reshape(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    given = []
    llama.model.rotary_emb.register_forward_pre_hook(lambda module, args, kwargs: given.append((args, kwargs)),
                                                     with_kwargs=True)  # fmt: skip
    cq.calibrate(llama, [packed, packed])
    assert all(packed["position_ids"].equal([*args, *kwargs.values()][1]) for args, kwargs in given)
    with pytest.raises(CanopyError, match="pixel_values"):
        cq.calibrate(llama, [{"input_ids": IDS, "pixel_values": torch.zeros(2, 3, 4, 4)}])


def test_a_chat_that_brings_its_bos_keeps_one() -> None:
    class Tokenizer(Words):
        bos_token_id = 7

        def encode(self, text: str) -> list[int]:
            return [7, *(7 if word == "<s>" else 2 for word in text.split())]

    [batch] = read_batches(["<s> a b", "a b c"], Model(), Tokenizer())
    assert batch.ids.tolist() == [[7, 2, 2, 0], [7, 2, 2, 2]]
