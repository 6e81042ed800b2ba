"""Computed numbers in texts, and the escaping of texts."""

from __future__ import annotations

import pytest

from canopyq.errors import CanopyError
from canopyq.lessons.arithmetic import evaluate, evaluate_all, fill
from canopyq.lessons.text import block, inline, plain, shorten


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7e9 * 4 / 8 / 1e9", 3.5),
        ("-2**7", -128),
        ("round(-2.5)", -2),
        ("max(1, 2) + 7 // 2 % 2", 3),
        ("log2(256)", 8.0),
        (5, 5),
    ],
)
def test_arithmetic(expression: str, value: float) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "open('x')",
        "(1).real",
        "[1, 2]",
        "'a' * 3",
        "True",
        "lambda: 1",
        "2 ** 9999",
        "1 / 0",
        "1 +",
        "x",
        "2 ** 0.5 ** -1j",
    ],
)
def test_everything_else_is_refused(expression: str) -> None:
    with pytest.raises(CanopyError):
        evaluate(expression)


def test_later_values_use_earlier_ones() -> None:
    values = evaluate_all({"parameters": "7e9", "gb": "parameters * 2 / 1e9"})
    assert fill("{gb} GB, {gb / 4:.2f} GB, {4 / 32:.1%}", values) == "14 GB, 3.50 GB, 12.5%"


def test_text_is_escaped_before_it_is_marked() -> None:
    html = inline('<script>alert(1)</script> `a < b & "c"` **bold** *it* 2**3**4')
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "a &lt; b &amp; &quot;c&quot;</code>" in html
    assert "<b>bold</b>" in html and "<i>it</i>" in html


def test_marks_in_code_are_left_alone() -> None:
    assert "2**bits - 2**x" in inline("`2**bits - 2**x`")


def test_blocks() -> None:
    html = block("one\ntwo\n\n- a\n- b\n  c\n\n    x = 1\n    y < 2")
    assert html.count("<p ") == 1 and html.count("<li>") == 2 and "x = 1\ny &lt; 2" in html


def test_shortening_stops_at_a_word() -> None:
    assert plain("a `b`  **c**\nd") == "a b c d"
    assert shorten("word " * 40).endswith("word ...") and len(shorten("word " * 40)) <= 76
