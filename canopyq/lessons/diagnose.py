"""Trying the reader's own function, and finding out what is wrong with it.

The function runs on every input of the exercise. If its results differ from the solution's, they are compared with the
results of each classic mistake: equal numbers on all inputs mean that this is the mistake that was made.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .exercises.base import Exercise
from .outcome import FormError, Outcome, copied, describe, differing, normalised, same


@dataclass(frozen=True)
class Finding:
    """The verdict on one attempt. ``kind`` is passed, todo, mistake, error, form or wrong."""

    kind: str
    title: str
    message: str
    call: str = ""
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def diagnose(exercise: Exercise, function: Any) -> Finding:
    """What is to be said about the reader's function."""
    if not callable(function):
        return _form(f"`check` needs the function itself, without parentheses: `ex.check({exercise.function})`.")
    cases = exercise.cases()
    mine: list[Outcome] = []
    for case in cases:
        given = copied(case)
        try:
            result = function(*given)
        except NotImplementedError:
            return Finding("todo", "Not attempted yet", f"Write `{exercise.function}`, then run this cell again.")
        except (Exception, SystemExit) as error:
            return _raised(exercise, function, error, case)
        if _nothing(result):
            if mine:
                return _form(
                    "For this input your function returns nothing. Every way through it needs a `return`.",
                    _call(exercise, case),
                )
            return Finding(
                "todo",
                "Not attempted yet",
                "Your function returns nothing. If you have written it, does it end with `return`?",
            )
        if not all(same(a, b) for a, b in zip(_tensors(given), _tensors(case), strict=True)):
            return _form(
                "Your function changes the tensor that it is given. Whoever calls it may still need it: avoid "
                "methods that end in `_` and assignments into `x`, or work on `x.clone()`.",
                _call(exercise, case),
            )
        try:
            mine.append(normalised(result, exercise))
        except FormError as error:
            return _form(str(error), _call(exercise, case))
    return _compare(exercise, cases, mine)


def outcomes(exercise: Exercise, source: str, cases: list[tuple]) -> list[Outcome]:
    """What a function given as source returns for each input."""
    function = exercise.build(source)
    return [normalised(function(*copied(case)), exercise) for case in cases]


def _compare(exercise: Exercise, cases: list[tuple], mine: list[Outcome]) -> Finding:
    right = outcomes(exercise, exercise.solution, cases)
    wrong = [(i, p) for i in range(len(cases)) for p in exercise.parts if not same(mine[i].parts[p], right[i].parts[p])]
    notes = tuple(dict.fromkeys(note for outcome in mine for note in outcome.notes))
    if wrong and _untouched(exercise, cases, mine):
        return Finding("todo", "Not attempted yet", f"This is `{exercise.function}` as it was given. Find its faults.")
    if not wrong:
        inputs = f"{len(cases)} inputs of different shapes and sizes, all equal to the reference."
        return Finding("passed", "Passed", inputs, notes=notes)
    first, part = wrong[0]
    rows = differing(exercise, cases[first], mine[first].parts[part], right[first].parts[part], part)
    call = _call(exercise, cases[first])
    name, message, sure = _recognise(exercise, cases, mine, right, wrong)
    if name and sure:
        return Finding("mistake", name, message, call, rows, notes)
    ours, theirs = right[first].parts[part], mine[first].parts[part]
    text = (
        f"`{part}` differs from the reference." if len(exercise.parts) > 1 else "The result differs from the reference."
    )
    if ours.shape != theirs.shape:
        text = f"`{part}` has shape {tuple(theirs.shape)}, and {tuple(ours.shape)} is expected."
    if name:
        text += f" It looks like this classic, perhaps with something else: **{name}**. {message}"
    return Finding("wrong", "Not right yet", text, call, rows, notes)


def _untouched(exercise: Exercise, cases: list[tuple], mine: list[Outcome]) -> bool:
    """Whether the results are those of the function that the exercise begins with, faults and all."""
    try:
        given = outcomes(exercise, exercise.stub, cases)
    except NotImplementedError:
        return False
    return all(same(a.parts[p], b.parts[p]) for a, b in zip(mine, given, strict=True) for p in exercise.parts)


def _recognise(
    exercise: Exercise, cases: list[tuple], mine: list[Outcome], right: list[Outcome], wrong: list[tuple[int, str]]
) -> tuple[str, str, bool]:
    """Name and message of the classic mistake, and whether it explains everything that was returned."""
    part = next(p for p in exercise.parts if any(p == q for _, q in wrong))
    at = [i for i, q in wrong if q == part]
    exact, by_part, partly = {}, {}, {}
    for mistake in exercise.mistakes:
        theirs = outcomes(exercise, mistake.source, cases)
        if all(same(a.parts[p], b.parts[p]) for a, b in zip(mine, theirs, strict=True) for p in exercise.parts):
            exact[mistake.name] = mistake.message
        if all(same(a.parts[part], b.parts[part]) for a, b in zip(mine, theirs, strict=True)):
            by_part[mistake.name] = mistake.message
        explained = sum(same(mine[i].parts[part], theirs[i].parts[part]) for i in at)
        if explained > partly.get(mistake.name, (0, ""))[0]:
            partly[mistake.name] = (explained, mistake.message)
    for found in (exact, by_part):
        if len(found) == 1:
            return *next(iter(found.items())), True
    best = sorted(partly.items(), key=lambda item: -item[1][0])
    if best and 2 * best[0][1][0] >= len(at) and (len(best) == 1 or best[0][1][0] > best[1][1][0]):
        return best[0][0], best[0][1][1], False
    return "", "", False


def _raised(exercise: Exercise, function: Callable, error: BaseException, case: tuple) -> Finding:
    """An exception: its type, its first line, and the reader's own line that led to it."""
    code = getattr(function, "__code__", None)
    text = (str(error).strip().splitlines() or [""])[0]
    message = f"`{type(error).__name__}`: {text[:200]}"
    frames = [f for f in traceback.walk_tb(error.__traceback__) if code and f[0].f_code.co_filename == code.co_filename]
    if frames:
        frame, line = frames[-1]
        shown = linecache.getline(code.co_filename, line).strip()
        where = f"line {line - code.co_firstlineno + 1} of your function" if frame.f_code is code else "your cell"
        message += f"\n\nIt was raised in {where}" + (f":\n\n    {shown}" if shown else ".")
    elif isinstance(error, TypeError):
        message += f"\n\nIt will be called as `{exercise.function}({', '.join(exercise.arguments)})`."
    return Finding("error", "Your function raised an error", message, _call(exercise, case))


def _form(message: str, call: str = "") -> Finding:
    return Finding("form", "Not right yet", message, call)


def _nothing(result: Any) -> bool:
    if isinstance(result, (tuple, list)) and len(result):
        return all(r is None or r is Ellipsis for r in result)
    return result is None or result is Ellipsis


def _tensors(case: tuple) -> list[Tensor]:
    return [value for value in case if isinstance(value, torch.Tensor)]


def _call(exercise: Exercise, case: tuple) -> str:
    return f"{exercise.function}({', '.join(describe(value) for value in case)})"
