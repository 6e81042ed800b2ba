"""Patterns of a config: the same names as `re.match`, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canopyq.checkpoint.patterns import MOST, matching
from canopyq.errors import CanopyError

NAMES = [f"model.layers.{i}.{leaf}" for i in (0, 1, 11, 111) for leaf in (
    "self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.experts.3.up_proj", "mlp.gate")] + [
    "lm_head", "model.embed_tokens", "a", "é-ß", "model_layers_1"]  # fmt: skip
REAL = [
    ".*", "model", ".*mlp.*", r".*\.mlp\..*", r"model\.layers\.[0-9]+\.self_attn\.[qkv]_proj$", "lm_head", "^lm_head$",
    r".*layers\.(0|11)\..*(down|up)_proj", r"(?!.*experts).*proj", r"^(?!.*(lm_head|gate$)).*", r".*\d{2,3}\.mlp",
    r".*(?<=self_attn\.)q_proj", r".*(?<!self_attn\.)k?q?_?proj", r"\w+$", r"(?:model\.)?layers",
    r"model(\.\w+)*\.gate",
    r".*\bmlp\b", r"\S+?_proj", "", "$", "x*", "(?:a?){3}", r"[^.]*$", r".*[\d_]+$", r"\D+\Z", r"(?:\w|[.-])+?ß",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REAL)
def test_the_names_that_re_finds(pattern: str) -> None:
    assert matching([pattern], NAMES) == {pattern: {name for name in NAMES if re.match(pattern, name)}}


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", r"\B", "(?=a)", "(?!b.)",
                         "(?<=a)", "(?<!b)", "(?=.*b)"])  # fmt: skip
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{0,3}?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
    ),
    max_leaves=6,
)


@given(pattern=PATTERNS, names=st.lists(st.text("ab.1", min_size=1, max_size=6), min_size=1, max_size=6, unique=True))
@settings(max_examples=600)
def test_random_patterns_find_what_re_finds(pattern: str, names: list[str]) -> None:
    assert matching([pattern], names) == {pattern: {name for name in names if re.match(pattern, name)}}


@pytest.mark.parametrize(
    "pattern",
    [
        "([a-z0-9_.]+)+!", "(a|a)*!", "(.*)*!", "(((.*)*)*)*!", ".*" * 400 + "!", "(?:a?){500}a{500}!",
        "((a{1000}){1000}){1000}", "((.{0,999}){0,999}){0,999}!", "(" * 60 + "a+" + ")+" * 60, "(?=(.*)*!)" * 50,
        r"((?!(.+)+!).)*!", r"(?:\w*\.)*" * 40 + "!", "(?:" + "|".join(["a.*"] * 150) + ")*!",
    ],
    ids=lambda pattern: pattern[:20],
)  # fmt: skip
def test_no_pattern_takes_long(pattern: str) -> None:
    """Names of 250 letters: `re` would be busy for the age of the universe, or run out of memory."""
    names = ["a" * 250 + str(i) for i in range(20)]
    begin = time.process_time()
    try:
        assert matching([pattern], names) == {pattern: set()}
    except CanopyError as error:
        assert "take too long" in str(error)
    assert time.process_time() - begin < 10


def test_many_patterns() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.{leaf}_proj" for i in range(40) for j in range(64) for leaf in "abc"]
    patterns = [rf".*layers\.{i}\..*experts.*({i}|{i + 1}).*proj" for i in range(40)]
    begin = time.process_time()
    found = matching(patterns, names)
    assert time.process_time() - begin < 10
    assert found[patterns[3]] == {name for name in names if re.match(patterns[3], name)} != set()
    with pytest.raises(CanopyError, match="name the layers in full"):
        matching([f"a{i}" for i in range(MOST + 1)], names)


@pytest.mark.parametrize(
    "pattern", ["(", "a{2,1}", "[z-a]", r"(a)\1", "(?i)a", "(?i:a)", "(a)?(?(1)b|c)", "a" * 2000, "(" * 900, "(?P<a>"]
)
def test_what_is_no_pattern_here(pattern: str) -> None:
    with pytest.raises(CanopyError) as refused:
        matching([pattern], NAMES)
    assert len(str(refused.value)) < 400
