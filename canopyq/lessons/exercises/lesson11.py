"""Lesson 11: choosing among measured recipes."""

from __future__ import annotations

import torch

from .base import Exercise, Mistake, altered, normal

STUB = """\
def pick(size, kl, right, memory, floor):
    raise NotImplementedError("replace this line")
"""

SOLUTION = """\
def pick(size, kl, right, memory, floor):
    meets = (size <= memory) & (right >= floor)
    if not meets.any():
        return -1
    return torch.where(meets, kl, torch.inf).argmin()
"""


def _wrong(name: str, message: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, message, altered(SOLUTION, *changes))


def cases() -> list[tuple]:
    """Four recipes to read; then random ones and budgets that one of them fills to the byte; some that none meets."""
    size, kl = torch.tensor([8.0, 5.0, 4.0, 3.0]), torch.tensor([0.1, 0.4, 0.5, 6.0])
    right = torch.tensor([1.0, 0.98, 0.99, 0.7])
    made: list[tuple] = [(size, kl, right, 6.0, 0.9), (size, kl, right, 4.0, 0.99), (size, kl, right, 2.0, 0.5)]
    for seed in range(8):
        size, kl = normal(seed, 9).abs() * 5 + 1, normal(seed + 20, 9).abs()
        right = 1 - 0.1 * normal(seed + 40, 9).abs().clamp(max=5)
        made.append((size, kl, right, float(size.sort().values[5]), float(right.sort().values[3])))
    made.append((size, kl, right, 0.5, 0.1))
    return made


PICK = Exercise(
    id="11-pick",
    title="Be the advisor",
    minutes=6,
    difficulty=2,
    task="""
Write `pick(size, kl, right, memory, floor)`: which of several measured recipes to take when accuracy matters most.

- `size`, `kl` and `right` are tensors with one entry a recipe: its bytes, its KL, its share of right answers.
- A recipe meets the needs if it takes at most `memory` and has at least `floor` right.
- Return the number (index) of the one with the least KL among those that meet both, and `-1` if none does.
""",
    function="pick",
    stub=STUB,
    solution=SOLUTION,
    hints=(
        "Which recipes may be taken at all? That is a tensor of True and False.",
        "Two conditions, joined by `&`, each in parentheses. Then look for the least KL among the True ones, without "
        "losing "
        "their places.",
        "`torch.where(meets, kl, torch.inf).argmin()` keeps the places. Before it: if `meets` has no True, return -1.",
    ),
    mistakes=(
        _wrong(
            "memory forgotten",
            "You look at the floor alone. The recipe has to fit into `memory` as well.",
            ("(size <= memory) & (right >= floor)", "right >= floor"),
        ),
        _wrong(
            "floor forgotten",
            "You look at the memory alone. The answers have to stay right too: at least `floor`.",
            ("(size <= memory) & (right >= floor)", "size <= memory"),
        ),
        _wrong(
            "an answer where there is none",
            "For needs that no recipe meets your function still names one: `argmin` of nothing but infinities is 0. "
            "Return -1.",
            ("    if not meets.any():\n        return -1\n", ""),
        ),
        _wrong(
            "one of the two is enough",
            "You take recipes that meet one of the needs. Both have to be met: `&`, not `|`.",
            ("(size <= memory) & (right >= floor)", "(size <= memory) | (right >= floor)"),
        ),
        _wrong(
            "a full budget counts as too much",
            "You ask for *less* than the memory and *more* than the floor. To the byte is fine: `<=` and `>=`.",
            ("(size <= memory) & (right >= floor)", "(size < memory) & (right > floor)"),
        ),
        _wrong(
            "the smallest instead of the best",
            "You return the smallest recipe that meets the needs. Memory that is there need not be saved: the least "
            "KL wins.",
            ("torch.where(meets, kl, torch.inf)", "torch.where(meets, size, torch.inf)"),
        ),
        _wrong(
            "the place among those left",
            "You filter first and return the place in the shorter list. Keep the places of the full one, with "
            "`torch.where(meets, kl, torch.inf)`.",
            ("torch.where(meets, kl, torch.inf).argmin()", "kl[meets].argmin()"),
        ),
        _wrong(
            "the KL instead of its place",
            "You return the KL itself. The task asks which recipe has it: `argmin`, not `min`.",
            ("torch.where(meets, kl, torch.inf).argmin()", "torch.where(meets, kl, torch.inf).min()"),
        ),
        _wrong(
            "the worst of them",
            "You return the recipe with the largest KL. Less is better.",
            ("torch.where(meets, kl, torch.inf).argmin()", "torch.where(meets, kl, -torch.inf).argmax()"),
        ),
    ),
    cases=cases,
    parts=("index",),
    integers=("index",),
)

EXERCISES = [PICK]
