"""A message is one line that any terminal may show, whatever the value that it quotes."""

from __future__ import annotations

import pytest
import torch

from canopyq.errors import CanopyError, did_you_mean, shown, unknown

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
