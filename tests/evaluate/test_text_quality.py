"""Text of one's own: how it is read and cut, and figures of a model on it against double precision, token by token."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import transformers as tf

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.evaluate.stats import bootstrap
from canopyq.evaluate.texts import read_texts, windows

TEXT = "\n".join(f"{question.prompt}\n{question.answer}" for question in cq.tutor.questions(60, seed=5))
LENGTH = 64


@pytest.fixture(scope="module")
def tutor():
    return cq.tutor.load()


@pytest.fixture(scope="module")
def damaged(tutor):
    model = copy.deepcopy(tutor[0])
    cq.quantize_(model, "w3a16-g128")
    return model


# What a text becomes --------------------------------------------------------------------------------------------------


def test_a_file_and_a_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("zwei", encoding="utf-8-sig")
    (tmp_path / "a.MD").write_text("eins: ä", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    assert read_texts(tmp_path / "b.txt") == ["zwei"]
    assert read_texts(tmp_path) == ["eins: ä", "zwei"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b" \n\n"], ids=["not UTF-8", "empty", "blank"])
def test_a_file_that_holds_no_text(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_bytes(content)
    for path in (file, tmp_path):
        with pytest.raises(CanopyError, match=r"file\.txt|holds no text"):
            read_texts(path)


def test_a_folder_without_text(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CanopyError, match=str(path)):
            read_texts(path)


def test_windows_are_the_text_and_each_begins_with_bos(tutor) -> None:
    model, tokenizer = tutor
    cut = windows(TEXT, tokenizer, model, tokens=10**6, length=LENGTH)
    assert all(ids.shape == (1, LENGTH) and ids[0, 0] == tokenizer.bos_token_id for ids in cut)
    text = torch.cat([ids[0, 1:] for ids in cut])
    whole = tokenizer.encode(TEXT, add_special_tokens=False)
    assert text.tolist() == whole[: len(text)] and len(whole) - len(text) < LENGTH - 1
    few = windows(TEXT, tokenizer, model, tokens=3 * LENGTH - 1, length=LENGTH)
    assert len(few) == 2 and torch.equal(torch.cat(few), torch.cat(cut[:2]))


def test_what_a_window_begins_with(tutor) -> None:
    """BOS, else EOS; where a tokenizer has neither, text alone."""
    model, tokenizer = tutor
    own = copy.deepcopy(tokenizer)
    own.bos_token = None
    assert windows(TEXT, own, model, tokens=99, length=9)[0][0, 0] == own.eos_token_id
    own.eos_token = None
    ids = windows(TEXT, own, model, tokens=18, length=9)
    assert torch.cat(ids).flatten().tolist() == own.encode(TEXT, add_special_tokens=False)[:18]


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("too short", {}, "511"), ("", {}, "0 tokens"), (TEXT, {"length": 10**5}, "length=100000"),
        (TEXT, {"length": 1}, "length=1"), (TEXT, {"tokens": 100}, "tokens=100"), ([], {}, "text"), ([3], {}, "text=3"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut(text, options: dict, named: str, tutor) -> None:
    with pytest.raises(CanopyError, match=named) as caught:
        cq.examine_text(*tutor, text, **options)
    assert "\n" not in str(caught.value)


# Figures --------------------------------------------------------------------------------------------------------------


def predictions(model, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (tokens, vocabulary) in double precision."""
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)


def test_figures_are_those_of_double_precision(tutor, damaged) -> None:
    model, tokenizer = tutor
    result = cq.compare_text(model, damaged, tokenizer, TEXT, tokens=4 * LENGTH, length=LENGTH)
    losses, kls, same = [], [], []
    for ids in windows(TEXT, tokenizer, model, tokens=4 * LENGTH, length=LENGTH):
        p, q = predictions(model, ids), predictions(damaged, ids)
        losses.append([-float(each.gather(1, ids[0, 1:, None]).mean()) for each in (p, q)])
        kls.append(float((p.exp() * (p - q)).sum(1).mean()))
        same.append(float((p.argmax(1) == q.argmax(1)).double().mean()))
    before, after = zip(*losses, strict=True)
    assert result.reference.perplexity == pytest.approx(math.exp(sum(before) / 4), rel=1e-4)
    assert result.model.perplexity == pytest.approx(math.exp(sum(after) / 4), rel=1e-4)
    assert result.kls == pytest.approx(kls, rel=1e-3) and result.kl == pytest.approx(sum(kls) / 4, rel=1e-3)
    assert result.agreements == pytest.approx(same, abs=1.5 / LENGTH)  # two tokens alike may change places
    assert result.model.tokens == 4 * (LENGTH - 1)
    assert result.kl_interval == bootstrap(result.kls)
    low, high = result.perplexity_ratio_interval
    assert low <= result.perplexity_ratio <= high and low > 1  # three bits cost something in every window
    assert result.perplexity_ratio == pytest.approx(result.model.perplexity / result.reference.perplexity)
    alone = cq.examine_text(damaged, tokenizer, TEXT, tokens=4 * LENGTH, length=LENGTH)
    assert alone == result.model


def test_a_model_beside_itself(tutor) -> None:
    result = cq.compare_text(tutor[0], *tutor, TEXT, tokens=LENGTH, length=LENGTH)
    assert result.kl == 0 and result.agreement == result.perplexity_ratio == 1
    assert result.kl_interval is None and "one window" in str(result)
    assert result.to_dict()["kl"] == {"value": 0, "low": None, "high": None}


def test_a_quantized_cache(tutor) -> None:
    result = cq.compare_text(tutor[0], *tutor, TEXT, tokens=512, length=256, cache="kv4")
    assert 0 < result.kl < 0.05 and result.model.cache_bytes < result.reference.cache_bytes / 2
    assert result.model.bytes == result.reference.bytes


def test_models_of_two_vocabularies(tutor) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    other = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=1300, **sizes)).eval()
    with pytest.raises(CanopyError, match="1280 and 1300"):
        cq.compare_text(tutor[0], other, tutor[1], TEXT, tokens=LENGTH, length=LENGTH)
