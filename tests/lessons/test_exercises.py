"""Mutation tests: the solution passes, the stub is not attempted, and each classic mistake is called by its name."""

from __future__ import annotations

import re
from copy import deepcopy
from itertools import combinations

import pytest
import torch

import canopyq as cq
from canopyq import lessons
from canopyq.lessons.diagnose import diagnose, outcomes
from canopyq.lessons.exercises import load, names
from canopyq.lessons.outcome import same
from canopyq.lessons.progress import LESSONS

MUTANTS = [(name, i) for name in names() for i in range(len(load(name).mistakes))]


@pytest.mark.parametrize("name", names())
def test_the_card_is_whole(name: str) -> None:
    spec = load(name)
    assert name[:2] in LESSONS and spec.minutes <= 15 and 1 <= spec.difficulty <= 5
    assert len(spec.hints) == 3 and len({m.name for m in spec.mistakes}) >= 3
    assert f"`{spec.function}(" in spec.task and f"def {spec.function}(" in spec.stub
    assert spec.solution.splitlines()[0] == spec.stub.splitlines()[0], "stub and solution have the same signature"


@pytest.mark.parametrize("name", names())
def test_the_solution_passes(name: str) -> None:
    spec = load(name)
    finding = diagnose(spec, spec.build(spec.solution))
    assert finding.kind == "passed" and finding.notes == ()


@pytest.mark.parametrize("name", names())
def test_numbers_in_the_task_are_right(name: str) -> None:
    spec = load(name)
    call = rf"`({spec.function}\([^`()]*\d\))` is (-?[\d.]*\d)"
    for example, result in re.findall(call, spec.task):
        assert eval(example, {spec.function: spec.build(spec.solution)}) == float(result)


@pytest.mark.parametrize("name", names())
def test_the_stub_is_not_attempted(name: str) -> None:
    spec = load(name)
    assert diagnose(spec, spec.build(spec.stub)).kind == "todo"


@pytest.mark.parametrize(("name", "i"), MUTANTS, ids=[f"{n}-{load(n).mistakes[i].name}" for n, i in MUTANTS])
def test_each_mistake_is_called_by_its_name(name: str, i: int) -> None:
    spec = load(name)
    mistake = spec.mistakes[i]
    finding = diagnose(spec, spec.build(mistake.source))
    assert (finding.kind, finding.title, finding.message) == ("mistake", mistake.name, mistake.message)
    assert finding.rows and finding.call.startswith(spec.function + "(")


@pytest.mark.parametrize("name", names())
def test_no_two_mistakes_look_the_same(name: str) -> None:
    spec = load(name)
    cases = spec.cases()
    results = [(m.name, outcomes(spec, m.source, cases)) for m in spec.mistakes]
    results.append(("right", outcomes(spec, spec.solution, cases)))
    for (one, a), (two, b) in combinations(results, 2):
        if one != two:
            assert not all(same(x.parts[p], y.parts[p]) for x, y in zip(a, b, strict=True) for p in spec.parts), (
                one,
                two,
            )


@pytest.mark.parametrize("name", names())
def test_no_mistake_passes_by_luck(name: str) -> None:
    """Leave any one input out: every mistake but the rarest is still caught."""
    spec = load(name)
    cases = spec.cases()
    right = outcomes(spec, spec.solution, cases)
    for mistake in spec.mistakes:
        wrong = outcomes(spec, mistake.source, cases)
        caught = sum(
            any(not same(x.parts[p], y.parts[p]) for p in spec.parts) for x, y in zip(right, wrong, strict=True)
        )
        rare = (
            mistake.name == "no clamp" and name == "02-quantize-asymmetric"
        )  # needs a range that ends between two codes
        assert caught >= (1 if rare else 2), mistake.name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), [("03-quantized-linear", 8), ("06-group-scales", 4)])
def test_the_faults_cost_the_tutor_what_the_task_says(name: str, times: int) -> None:
    """INT4 in groups of 128: nearly all answers are still right, and KL is so many times that of the solution."""
    spec, (model, tokenizer) = load(name), cq.tutor.load()
    questions = [q for q in cq.tutor.questions(34) if len(q.turns) < 8]
    original, kl = cq.examine(model, tokenizer, questions, keep=True), {}
    for source in (spec.stub, spec.solution):
        function, copy = spec.build(source), deepcopy(model)
        for module in copy.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = restored_by(function, name, module.weight.detach())
        found = cq.compare(original, copy, tokenizer, questions)
        kl[source] = found.kl
        assert found.model.accuracy.value > 0.95
    assert times / 2 < kl[spec.stub] / kl[spec.solution] < 2 * times


def restored_by(function, name: str, weight: torch.Tensor) -> torch.Tensor:
    """What the function of the exercise leaves of a weight in INT4, groups of 128."""
    if name == "06-group-scales":
        groups = weight.reshape(len(weight), -1, 128)
        scale = function(weight, 128, 4)
        return (torch.clamp(torch.round(groups / scale), -8, 7) * scale).reshape(weight.shape)
    q = cq.quantize(weight, "int4", "g128")
    identity, no_bias = torch.eye(weight.shape[1]), torch.zeros(len(weight))
    return function(identity, q.codes, q.scale.reshape(len(weight), -1), no_bias).T


def test_the_inputs_are_the_same_every_time() -> None:
    for name in names():
        for one, two in zip(load(name).cases(), load(name).cases(), strict=True):
            assert all(
                torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True)
            )


def test_rounding_agrees_with_torch() -> None:
    spec = load("01-round-to-format")
    x = torch.randn(2000, generator=torch.Generator().manual_seed(5))
    x = x[x.abs() > 2**-6]  # the subnormals of E4M3 begin there
    for bits, dtype in [(7, torch.bfloat16), (10, torch.float16), (3, torch.float8_e4m3fn)]:
        assert torch.equal(spec.build(spec.solution)(x, bits), x.to(dtype).float())


def test_asymmetric_agrees_with_the_package() -> None:
    spec = load("02-quantize-asymmetric")
    for x, bits in spec.cases():
        codes, scale, zero_point = spec.build(spec.solution)(x, bits)
        q = cq.quantize(x, f"int{bits}", "tensor", symmetric=False)
        assert torch.equal(codes, q.codes) and zero_point == q.zero_point and torch.isclose(scale, q.scale)


def test_symmetric_agrees_with_the_package() -> None:
    spec = load("02-symmetric")
    for x, scale in spec.cases():
        if scale is None:
            codes, scale, values = spec.build(spec.solution)(x)
            q = cq.quantize(x, "int8", "tensor", restricted=True)
            assert torch.equal(codes, q.codes) and torch.isclose(scale, q.scale)
            torch.testing.assert_close(values, q.dequantize())


def test_the_solution_unlocks_after_three_tries() -> None:
    card = lessons.exercise("00-bytes")
    card.widget()
    assert card._button.disabled and "locked" in repr(card.solution())
    card.check(card.spec.build(card.stub))
    assert card._button.disabled, "an untouched stub is no try"
    for left in (2, 1):
        assert f"solution unlocks: {left}" in card.check(lambda parameters, bits: 1.0).static_html()
        assert card._button.disabled
    assert "unlocked" in lessons.exercise("00-bytes").check(lambda parameters, bits: 1.0).static_html()
    assert not card._button.disabled, "a check on another card of the same exercise unlocks this one too"
    card._button.click()
    assert "parameters * bits / 8" in card._solution.value


def test_passing_unlocks_at_once_and_stays() -> None:
    card = lessons.exercise("00-bytes")
    assert repr(card.check(lambda parameters, bits: parameters * bits / 8)) == "Exercise 00-bytes: passed"
    assert lessons.exercise("00-bytes").unlocked
    lessons.exercise("00-bytes").check(lambda parameters, bits: 0.0)
    assert "exercises 1 of 1" in repr(lessons.progress()).splitlines()[0]


def test_hints_open_and_close() -> None:
    card = lessons.exercise("02-symmetric")
    card.widget()
    card.widget().children[2].children[1].click()
    assert "Hint 2." in card._hints.value and "Hint 1." not in card._hints.value
    card.widget().children[2].children[0].click()
    assert card._hints.value.index("Hint 1.") < card._hints.value.index("Hint 2.")
    card.widget().children[2].children[1].click()
    assert "Hint 2." not in card._hints.value
    assert repr(card.hint(3)).startswith("Hint 3.")


def test_the_static_card_hides_the_solution_and_never_changes() -> None:
    for name in names():
        before = lessons.exercise(name)._repr_mimebundle_()
        spec = load(name)
        lessons.exercise(name).check(spec.build(spec.solution))
        after = lessons.exercise(name)._repr_mimebundle_()
        assert before["text/html"] == after["text/html"] and before["text/plain"] == after["text/plain"]
        assert spec.solution.splitlines()[1].strip() not in before["text/html"]
        assert before["text/html"].count("<details") == 3 and "unlocks in a live notebook" in before["text/html"]
