"""All exercises: every ``lessonNN*.py`` here holds a list called EXERCISES."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from canopyq import checks

from .base import Exercise, Mistake

__all__ = ["Exercise", "Mistake", "load", "names"]


@cache
def _all() -> dict[str, Exercise]:
    modules = sorted(m.name for m in iter_modules(__path__) if m.name.startswith("lesson"))
    return {e.id: e for name in modules for e in import_module(f"{__name__}.{name}").EXERCISES}


def names() -> list[str]:
    """The ids of all exercises, in the order of the lessons."""
    return list(_all())


def load(name: str) -> Exercise:
    return _all()[checks.choice("exercise", name, names())]
