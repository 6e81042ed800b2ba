"""A chat that keeps its cache answers as one that is read anew at every turn."""

from __future__ import annotations

import pytest

import canopyq as cq
from canopyq.errors import CanopyError
from canopyq.evaluate.chat import Conversation
from canopyq.memory import bytes_held

ASKED = ("My locker code is 4821.", "What is 17 + 25?", "Spell 'library'.", "What is my locker code?")


@pytest.fixture(scope="module")
def tutor():
    return cq.tutor.load()


@pytest.mark.parametrize("cache", [None, "kv8", "kv4"])
def test_answers_are_those_of_a_chat_read_anew(cache: str | None, tutor) -> None:
    talk = Conversation(*tutor, cache)
    for question in ASKED:
        expected = cq.tutor.ask(*tutor, question, history=tuple(talk.turns))
        assert talk.ask(question) == expected
    assert talk.turns[-1][1] == "4821."
    assert talk.tokens == len(talk.ids) - 1  # the last token ended the answer and was not fed


def test_only_what_is_new_goes_through_the_model(tutor) -> None:
    model, tokenizer = tutor
    talk, seen = Conversation(model, tokenizer, "kv4", residual_length=3), []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    try:
        for question in ASKED:
            talk.ask(question)
    finally:
        hook.remove()
    assert sum(seen) == talk.tokens
    assert talk.cache.layers[0].residual_length == 3


def test_bytes_grow_with_the_chat_and_are_fewer_with_fewer_bits(tutor) -> None:
    size = {}
    for cache in (None, "kv8", "kv2"):
        talk = Conversation(*tutor, cache)
        grown = []
        for i in range(8):
            talk.ask(f"What is {i} + {i}?")
            grown.append(talk.cache_bytes)
        if cache is None:
            assert grown[-1] == talk.tokens * 2 * 8 * 2 * 64 * 4
            assert grown == sorted(grown)
        size[cache] = grown[-1]
    assert size["kv2"] < size["kv8"] < size[None]
    assert talk.weight_bytes == bytes_held(tutor[0])


def test_the_end_of_the_context_is_said_and_leaves_the_chat(tutor, monkeypatch) -> None:
    talk = Conversation(*tutor, "kv4")
    monkeypatch.setattr(talk.model.config, "max_position_embeddings", 40)
    talk.ask(ASKED[0])
    held = talk.tokens, list(talk.turns)
    with pytest.raises(CanopyError, match="and the model takes 40; start a new chat"):
        talk.ask("Sort these: " + "7 " * 30)
    assert (talk.tokens, talk.turns) == held
    assert talk.ask("What is 17 + 25?") == "42."
    talk.restart()
    assert (talk.tokens, talk.turns, talk.cache_bytes) == (0, [], 0)


@pytest.mark.parametrize("passes", [1, 3])
def test_after_an_interruption_the_chat_is_read_anew(tutor, passes: int) -> None:
    model, tokenizer = tutor
    talk = Conversation(model, tokenizer, "kv4")
    talk.ask(ASKED[0])
    calls = []

    def interrupt(module, args, out):
        calls.append(None)
        if len(calls) == passes:
            raise KeyboardInterrupt

    hook = model.model.layers[4].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("Spell 'library'.")
    hook.remove()
    assert talk.turns == [(ASKED[0], "Noted.")]
    assert talk.ask(ASKED[3]) == "4821."
