"""What a quiz is made of. The quizzes themselves stand in one module a lesson."""

from __future__ import annotations

from dataclasses import dataclass

from canopyq.errors import unknown


@dataclass(frozen=True)
class Choice:
    """One answer, and why it is right or wrong."""

    letter: str
    text: str
    reason: str
    correct: bool = False


@dataclass(frozen=True)
class Question:
    """A question with one right choice. Progress is kept under its ``id``, which therefore never changes."""

    id: str
    lesson: str
    title: str
    question: str
    choices: tuple[Choice, ...]

    @property
    def right(self) -> Choice:
        """The one correct choice."""
        return next(c for c in self.choices if c.correct)

    def choice(self, letter: str) -> Choice:
        """The choice of that letter, in either case.

        Raises:
            CanopyError: if there is none.
        """
        for c in self.choices:
            if c.letter == str(letter).strip().lower():
                return c
        raise unknown(f"choice for quiz {self.id}", letter, [c.letter for c in self.choices])
