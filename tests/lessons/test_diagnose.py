"""What readers hand in besides right and wrong: nothing, errors, lists, changed inputs, two mistakes at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from canopyq import lessons
from canopyq.lessons.diagnose import diagnose
from canopyq.lessons.exercises import load
from canopyq.lessons.outcome import describe

BYTES, SYMMETRIC, ASYMMETRIC = load("00-bytes"), load("02-symmetric"), load("02-quantize-asymmetric")
ROUND, LINEAR = load("01-round-to-format"), load("03-quantized-linear")
SOLUTION = SYMMETRIC.build(SYMMETRIC.solution)


@pytest.mark.parametrize("result", [None, ..., (None, None, None), (..., ...)])
def test_nothing_returned(result: object) -> None:
    finding = diagnose(SYMMETRIC, lambda x, scale=None: result)
    assert finding.kind == "todo" and "return" in finding.message


def test_nothing_returned_on_one_way_through() -> None:
    finding = diagnose(SYMMETRIC, lambda x, scale=None: SOLUTION(x) if scale is None else None)
    assert finding.kind == "form" and "Every way through" in finding.message


def test_the_result_instead_of_the_function() -> None:
    assert "without parentheses" in diagnose(BYTES, 3.5).message


def test_an_error_names_the_readers_own_line() -> None:
    def quantize_symmetric(x, scale=None):
        y = x * 2
        return y.absolutely()

    finding = diagnose(SYMMETRIC, quantize_symmetric)
    assert finding.kind == "error"
    assert "`AttributeError`: 'Tensor' object has no attribute 'absolutely'" in finding.message
    assert "line 3 of your function" in finding.message and "return y.absolutely()" in finding.message


def test_an_error_deep_inside_torch_has_one_line() -> None:
    finding = diagnose(SYMMETRIC, lambda x, scale=None: torch.ones(3, 4) @ torch.ones(5))
    assert finding.kind == "error" and "Traceback" not in finding.message and len(finding.message) < 500


@pytest.mark.parametrize("function", [lambda: 1, lambda x, y, z: 1])
def test_a_wrong_signature(function) -> None:
    assert "model_bytes(parameters, bits)" in diagnose(BYTES, function).message


def test_an_interrupt_is_the_readers() -> None:
    def endless(parameters, bits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(BYTES, endless)


def test_leaving_python_is_an_error_like_any_other() -> None:
    def leave(parameters, bits):
        raise SystemExit("bye")

    assert "SystemExit" in diagnose(BYTES, leave).message


def test_a_changed_input() -> None:
    def in_place(x, scale=None):
        result = SOLUTION(x, scale)
        x.zero_()
        return result

    finding = diagnose(SYMMETRIC, in_place)
    assert finding.kind == "form" and "changes the tensor" in finding.message


@pytest.mark.parametrize("convert", [np.asarray, lambda t: t.tolist()])
def test_arrays_and_lists_count_with_a_remark(convert) -> None:
    finding = diagnose(SYMMETRIC, lambda x, scale=None: tuple(convert(part) for part in SOLUTION(x, scale)))
    assert finding.kind == "passed" and "the lessons go on with tensors" in finding.notes[0]


def test_codes_in_float_count_with_a_remark() -> None:
    def function(x, scale=None):
        codes, scale, values = SOLUTION(x, scale)
        return codes.float(), scale, values

    finding = diagnose(SYMMETRIC, function)
    assert finding.kind == "passed" and "one byte each" in finding.notes[0]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (torch.ones(3), "Return 3 things, `codes, scale, values`; yours returns a float32 tensor"),
        ((1, 2), "yours returns 2"),
        (("a", 1, 1), "`codes` should be a tensor or a number; yours is a str"),
        (([[1], [1, 2]], 1, 1), "`codes` should be a tensor of numbers"),
        ((torch.ones(3, dtype=torch.bool), 1, 1), "real numbers"),
        ({"codes": 1}, "yours returns a dict"),
    ],
)
def test_what_cannot_be_compared(result: object, words: str) -> None:
    finding = diagnose(SYMMETRIC, lambda x, scale=None: result)
    assert finding.kind == "form" and words in finding.message


def test_a_sparse_result_counts() -> None:
    exercise = load("01-round-to-format")
    assert diagnose(exercise, lambda *given: torch.ones(4).to_sparse()).kind in ("wrong", "mistake")


def test_a_wrong_shape() -> None:
    def flat(x, scale=None):
        codes, scale, values = SOLUTION(x, scale)
        return codes.flatten()[:2], scale, values

    finding = diagnose(SYMMETRIC, flat)
    assert finding.kind == "wrong" and "`codes` has shape (2,), and (4,) is expected" in finding.message


def test_wrong_with_the_first_example() -> None:
    finding = diagnose(SYMMETRIC, lambda x, scale=None: (SOLUTION(x, scale)[0] + 1, *SOLUTION(x, scale)[1:]))
    assert finding.kind == "wrong"
    assert finding.rows[0] == ("codes[0]", "-0.5", "-127", "-126")
    html = lessons.exercise("02-symmetric").check(lambda x, scale=None: SOLUTION(x, scale)[::-1]).static_html()
    assert "expected" in html and "got" in html


def test_two_mistakes_at_once_are_still_recognised() -> None:
    def truncated_and_nan(x, mantissa_bits):
        step = 2.0 ** (torch.floor(torch.log2(x.abs())) - mantissa_bits)
        return torch.trunc(x / step) * step

    finding = diagnose(ROUND, truncated_and_nan)
    assert finding.kind == "wrong" and "truncation instead of rounding" in finding.message


def test_one_part_wrong_is_named_even_if_another_is_wrong_too() -> None:
    def function(x, bits):
        codes, scale, _ = ASYMMETRIC.build(next(m for m in ASYMMETRIC.mistakes if m.name == "always 8 bits").source)(
            x, bits
        )
        return codes, scale, 0

    assert diagnose(ASYMMETRIC, function).title == "always 8 bits"


def test_nothing_is_printed(capsys: pytest.CaptureFixture) -> None:
    card = lessons.exercise("02-symmetric")
    card.widget()
    card.check(lambda x, scale=None: 1)
    assert capsys.readouterr() == ("", "")


def test_results_are_escaped() -> None:
    def function(parameters, bits):
        raise ValueError("<script>alert(1)</script>")

    result = lessons.exercise("00-bytes").check(function)
    assert "<script" not in result.static_html() and "&lt;script&gt;" in result.static_html()


def test_the_input_is_shown_where_it_is_clear_which_one() -> None:
    def outputs_off_by_one(x, codes, scale, bias):
        return LINEAR.build(LINEAR.solution)(x, codes, scale, bias) + 1

    def codes_off_by_one(x, scale=None):
        codes, *rest = SOLUTION(x, scale)
        return (codes + 1, *rest)

    assert [row[1] for row in diagnose(LINEAR, outputs_off_by_one).rows] == ["", ""]  # a bias is no input of an output
    assert diagnose(SYMMETRIC, codes_off_by_one).rows[0][1] == "-0.5"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.tensor([1.0, 2.5]), "tensor([1, 2.5])"),
        (torch.ones(2, 2), "tensor of shape (2, 2): 1, 1, 1, 1"),
        (torch.ones(5), "tensor of shape (5,): 1, 1, 1, 1, …"),
    ],
)
def test_a_whole_tensor_ends_without_dots(value: torch.Tensor, shown: str) -> None:
    assert describe(value) == shown


def test_a_partial_likeness_is_named_only_if_it_explains_most() -> None:
    """Places in a list are few: two wrong ways often meet by chance."""
    end = load("08-best-end")
    rounded_up = end.solution.replace("torch.round", "torch.ceil")
    assert "absolute error" not in diagnose(end, end.build(rounded_up)).message
