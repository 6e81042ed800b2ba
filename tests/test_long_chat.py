"""Recall over long chats: same questions for every cache, and counts that are real."""

from __future__ import annotations

import pytest

import canopyq as cq
from benchmarks.long_chat import long_chat
from canopyq.errors import CanopyError
from canopyq.kv_cache import QuantizedCache


@pytest.fixture(scope="module")
def tutor():
    return cq.tutor.load()


def test_recall_by_cache_and_length(tutor) -> None:
    said = []
    caches = {"kv4": "kv4", "tokens": lambda config: QuantizedCache(config, "kv2", key_granularity="token")}
    found = long_chat(*tutor, caches, fillers=(0, 6), questions=6, say=said.append)
    assert found == said
    assert [(r.cache, r.fillers) for r in found] == [(c, n) for n in (0, 6) for c in ("none", "kv4", "tokens")]
    none, kv4, tokens = found[3:]
    assert found[0].tokens < none.tokens == kv4.tokens
    assert none.share.n == 6
    assert none.share.value == 1
    assert (none.kl, none.nbytes) == (0, None)
    assert 0 < kv4.kl < tokens.kl
    assert tokens.nbytes < kv4.nbytes < 2 * 8 * 2 * 64 * 4
    assert kv4.to_dict()["share"]["n"] == len(kv4.to_dict()["kls"]) == 6
    assert "KL" in str(kv4)
    late = long_chat(*tutor, ("kv4",), fillers=(6,), questions=2, first=4)
    # A KL of 3e-6 is of logits some 2e-3 apart; their float32 sums, in another order, are some 1e-5 off: 1e-5 / 2e-3
    assert (late[1].right, late[1].kls) == (kv4.right[4:], pytest.approx(kv4.kls[4:], rel=1e-2))


@pytest.mark.parametrize(("caches", "fillers"), [((), (0,)), (("kv4",), ())])
def test_nothing_to_measure(caches, fillers) -> None:
    with pytest.raises(CanopyError, match="needs a cache and a number of turns"):
        long_chat(None, None, caches, fillers)


def test_an_unknown_cache(tutor) -> None:
    with pytest.raises(CanopyError, match="unknown KV cache 'kv3'"):
        long_chat(*tutor, ("kv3",), (0,), 2)
