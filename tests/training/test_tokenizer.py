"""The tokenizer, the chat template, and the rows that training shows."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer

from canopyq.tutor import chat, stream
from training import tokenizer
from training.batches import Batches


@pytest.fixture(scope="module")
def built() -> Tokenizer:
    return tokenizer.build(chats=600)


def test_vocabulary(built: Tokenizer) -> None:
    assert built.get_vocab_size() == tokenizer.VOCABULARY
    assert [built.token_to_id(name) for name in tokenizer.SPECIALS] == list(range(5))
    assert not [token for token in built.get_vocab() if len(token) > 1 and any(c.isdigit() for c in token)]


@pytest.mark.parametrize(
    "text", ["12 - 345", "Grüße,\n\n  λ – don't, it's the dog's 3.5", "a-b-c--d ", "日本 \t x", ""]
)
def test_any_text_round_trips_and_the_fast_encoder_agrees(built: Tokenizer, text: str) -> None:
    ids = built.encode(text).ids
    assert built.decode(ids) == text
    assert tokenizer.CachedEncoder(built)(text) == ids


def test_fast_encoder_agrees_on_training_text(built: Tokenizer) -> None:
    encode, exchanges = tokenizer.CachedEncoder(built), stream.chat(Random(5))
    for _ in range(3000):
        for text in next(exchanges):
            ids = encode(text)
            assert ids == built.encode(text).ids and built.decode(ids) == text


def test_transformers_reads_the_same_tokenizer(trained: Path) -> None:
    raw, read = Tokenizer.from_file(str(trained / "tokenizer.json")), tokenizer.read(trained)
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (tokenizer.BOS, tokenizer.END, tokenizer.PAD)
    for text in ("What is 12 - 345?", "Reverse a-b-c.", "Grüße  x"):
        assert read.encode(text) == raw.encode(text).ids
        assert read.decode(read.encode(text)) == text


def test_chat_template(trained: Path) -> None:
    read = tokenizer.read(trained)
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    text = read.apply_chat_template([*messages, {"role": "user", "content": "Q2"}], tokenize=False)
    assert text == "<bos><user>Q<bot>A<end><user>Q2<bot>"


def test_encode_agrees_with_training_rows(trained: Path) -> None:
    """A question is examined in the very form in which training shows it."""
    raw, read = Tokenizer.from_file(str(trained / "tokenizer.json")), tokenizer.read(trained)
    ids, in_answer = Batches(tokenizer.CachedEncoder(raw), steps=1, tokens=1024).draw(Random(0), 512)
    exchanges = stream.chat(Random(0), "train", 10)
    turns = [next(exchanges) for _ in range(8)]
    encoded, start = chat.encode(read, turns)
    assert ids[0, : len(encoded)].tolist() == encoded
    assert in_answer[0, start : len(encoded)].all() and not in_answer[0, start - 1]


def test_batches_repeat_whoever_makes_them(built: Tokenizer) -> None:
    first = Batches(tokenizer.CachedEncoder(built), steps=10, tokens=1024, longest=512)
    again = Batches(tokenizer.CachedEncoder(built), steps=10, tokens=1024, longest=512)
    late, early = again[9], again[0]
    assert (first[0][0] == early[0]).all() and (first[9][0] == late[0]).all()
    assert first[0][0].shape[1] in (129, 257) and first[9][0].shape[1] in (129, 513)
    assert (first[0][0][:, 0] == tokenizer.BOS).all() and not (first[0][0] == tokenizer.PAD).any()
