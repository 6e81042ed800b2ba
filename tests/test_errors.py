"""A message is one line that any terminal may show, whatever the value that it quotes."""

from __future__ import annotations

import pytest
import torch

from canopyq.errors import CanopyError, and_more, by_reason, did_you_mean, one_line, prefixed, shown, unknown, wrapped
from canopyq.utils import Preformatted

VALUES = {
    "'int44'": "int44", "None": None, "3": 3, "nan": float("nan"), "Tensor": torch.Tensor, "an object": object(),
    "an integer of 20000 bits": 2**19_999, "a torch.float32 tensor (2, 3)": torch.ones(2, 3), "['a', 1]": ["a", 1],
    "a list of 9": [1] * 9, "a list of 1": [10**5000], "a dict of 1": {"a": object()},
    "a Linear": torch.nn.Linear(2, 2),
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_how_a_value_is_quoted(text: str) -> None:
    assert shown(VALUES[text]) == text


@pytest.mark.parametrize(
    "value", ["x" * 10**7, b"x" * 10**7, [10**4000] * 10**5, {"\x1b[2J": "\n"}, "\u202e\ud800\r\n"]
)
def test_no_value_is_long_or_brings_in_control_characters(value: object) -> None:
    for text in (shown(value), did_you_mean(value, ["int4"]), str(unknown("format", value, ["int4"]))):
        assert len(text) < 160 and text.isprintable()


def test_a_message_is_one_line() -> None:
    assert str(CanopyError("a\nb \x1b[31m c")) == r"a\nb \x1b[31m c"


def test_one_line_of_a_foreign_exception() -> None:
    assert one_line(OSError("no\n  such\tfile")) == "no such file"
    assert one_line(KeyError()) == "KeyError"
    long = one_line(ValueError("xy " * 500))
    assert len(long) == 160 and long.endswith("…")


def test_a_prefix_names_the_layer() -> None:
    with pytest.raises(CanopyError, match=r"^model\.head: 3 is odd$"), prefixed("model.head: "):
        raise CanopyError("3 is odd")
    with pytest.raises(KeyError), prefixed("model.head: "):
        raise KeyError("another kind of error stays as it is")


def test_names_are_counted_by_reason() -> None:
    assert and_more(["a"]) == "a" and and_more(["a", "b", "c"]) == "a and 2 more"
    assert by_reason({"a": "small", "b": "tied", "c": "small"}) == ["a and 1 more (small)", "b (tied)"]
    assert by_reason({}) == []


def test_results_are_shown_as_printed() -> None:
    class Result(Preformatted):
        def __str__(self) -> str:
            return "1 < 2\n  & more"

    assert Result()._repr_html_() == "<pre>1 &lt; 2\n  &amp; more</pre>"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.json"), "No such file or directory"),
        (KeyError("weight_scale"), "weight_scale"),
        (RuntimeError("first line\nsecond line"), "first line second line"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_a_library_refuses_is_one_line(error: Exception, reason: str) -> None:
    with pytest.raises(CanopyError) as caught, wrapped("a.json cannot be read", "copy it again"):
        raise error
    message = str(caught.value)
    assert "a.json" in message and reason in message and "copy it again" in message and "\n" not in message
    assert caught.value.__cause__ is error


def test_an_error_of_another_kind_and_one_of_our_own_pass() -> None:
    with pytest.raises(KeyError), wrapped("a.json cannot be read", "", OSError):
        raise KeyError("weight_scale")
    own = CanopyError("a.json is no file")
    with pytest.raises(CanopyError) as caught, wrapped("the model cannot be loaded"):
        raise own
    assert caught.value is own
