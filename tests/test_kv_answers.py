"""Greedy answers through a quantized cache: the short form of benchmarks/kv_answers.py."""

from __future__ import annotations

import pytest

import canopyq as cq
from benchmarks.kv_answers import CACHES, measure, questions, summary


def test_every_question_is_another_one_behind_a_chat() -> None:
    asked = questions(40)
    assert len({q.turns for q in asked}) == 40 and len(questions(7)) == 7
    assert [q.skill == "recall" for q in asked] == [False, True] * 20
    assert min(len(q.turns) for q in asked) > 12


@pytest.mark.slow
def test_kv8_writes_the_same_text() -> None:
    model, tokenizer = cq.tutor.load()
    asked = [q for q in questions(60) if len(q.turns) < 30][:12]
    rows = measure(model, tokenizer, asked, {"kv8": CACHES["kv8"]}, [])
    found = summary(rows, ["kv8"])["kv8"]
    assert found["codes_least"] >= 192  # most of each chat is read as codes
    assert found["all"]["right"] == found["all"]["n"] == 12
    assert sum(row["right"] for row in rows) >= 11
