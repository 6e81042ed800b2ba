"""All quizzes: every ``lessonNN.py`` here holds one, called QUIZ."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from canopyq import checks

from .base import Choice, Question

__all__ = ["Choice", "Question", "load", "names"]


@cache
def _all() -> dict[str, Question]:
    modules = sorted(m.name for m in iter_modules(__path__) if m.name.startswith("lesson"))
    return {quiz.id: quiz for quiz in (import_module(f"{__name__}.{name}").QUIZ for name in modules)}


def names() -> list[str]:
    """The ids of all quizzes, in the order of the lessons."""
    return list(_all())


def load(name: str) -> Question:
    """The quiz of that id."""
    return _all()[checks.choice("quiz", name, names())]
