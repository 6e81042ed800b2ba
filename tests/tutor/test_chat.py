"""From turns to token ids, and where a graded answer starts."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from canopyq.tutor import chat, loading
from canopyq.tutor.exam import questions

TURNS = (("What is 1 + 2?", "3."), ("Spell key.", "k-e-y."))


@pytest.fixture
def read() -> PreTrainedTokenizerBase:
    """The tutor's tokenizer, to be changed."""
    return AutoTokenizer.from_pretrained(loading.path(), local_files_only=True)


def test_encode_marks_exactly_the_answer(read: PreTrainedTokenizerBase) -> None:
    for question in questions(34):
        ids, start = chat.encode(read, question.turns)
        assert read.decode(ids[start:]) == question.answer + "<end>"
        assert read.decode([ids[0], ids[start - 1], ids[-1]]) == "<bos><bot><end>"
        assert read.decode(ids[:start]).endswith(f"<user>{question.prompt}<bot>")


def test_encode_with_another_chat_template(read: PreTrainedTokenizerBase) -> None:
    """A template that marks the answer's beginning and ends a turn with more than its end token."""
    read.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' %}{{ '~' }}{% endif %}"
        "{{ m['content'] + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    ids, start = chat.encode(read, TURNS)
    assert read.decode(ids[start:]) == "k-e-y.<end>"
    assert read.decode(ids[:start]) == (
        "[user]What is 1 + 2?<end>\n[assistant]~3.<end>\n[user]Spell key.<end>\n[assistant]~"
    )


def test_encode_without_a_chat_template(read: PreTrainedTokenizerBase) -> None:
    read.chat_template = None
    ids, start = chat.encode(read, TURNS)
    assert ids[0] == read.bos_token_id
    assert read.decode(ids[1:start]) == "Question: What is 1 + 2?\nAnswer: 3.\n\nQuestion: Spell key.\nAnswer:"
    assert read.decode(ids[start:]) == " k-e-y."
