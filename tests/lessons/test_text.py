"""Lesson text to HTML: escaped first, then marked."""

from __future__ import annotations

from canopyq.lessons.text import block, inline, plain, shorten


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
