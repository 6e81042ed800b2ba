"""Questions to examine the model with: drawn without replacement from what it never trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from canopyq import checks
from canopyq.errors import CanopyError, shown
from canopyq.tutor import recall, skills
from canopyq.tutor.draws import SPLITS, between

PATIENCE = 5_000  # draws in a row with nothing new after which a level counts as used up


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the chat before it. The last turn is what is graded."""

    skill: str
    level: int
    turns: tuple[tuple[str, str], ...]  # (what the student says, what the tutor should answer)

    @property
    def prompt(self) -> str:
        """What the student asks in the last turn."""
        return self.turns[-1][0]

    @property
    def answer(self) -> str:
        """The one right answer to the last turn."""
        return self.turns[-1][1]


def questions(
    n: int, skill: str | None = None, split: str = "test", seed: int = 0, *, fillers: int | None = None
) -> list[Question]:
    """``n`` different questions of a split; the same ones for the same seed.

    With no skill they are spread evenly over all of them. The levels of a skill get equal shares as far as they reach:
    there are only some twenty easy sums in the test split, and once they are used up harder ones fill their place.
    ``fillers`` sets how many turns lie between telling and asking; it goes with ``skill="recall"``.
    """
    checks.count("n", n), checks.count("seed", seed), checks.choice("split", split, SPLITS)
    if fillers is not None:
        checks.count("fillers", fillers, 0, 50)
    if skill is not None:
        return _exactly(n, skill, split, seed, fillers)
    if fillers is not None:
        raise CanopyError(f"fillers={fillers} goes with skill='recall' only; add it, or leave fillers out")
    names = list(skills.SKILLS)
    shares = [n // len(names) + (i < n % len(names)) for i in range(len(names))]
    # Skills of one level have the fewest questions. They come first, so that an n out of reach is refused at once.
    order = sorted(zip(names, shares, strict=True), key=lambda pair: skills.SKILLS[pair[0]].levels)
    drawn = {name: _exactly(share, name, split, seed) for name, share in order}
    groups = [drawn[name] for name in names]
    return [group[i] for i in range(max(shares)) for group in groups if i < len(group)]


def _exactly(n: int, name: str, split: str, seed: int, fillers: int | None = None) -> list[Question]:
    found = up_to(n, name, split, seed, fillers=fillers)
    if len(found) < n:
        raise CanopyError(
            f"skill {shown(name)} has {len(found)} questions in its {split} split, not {n}; ask for fewer"
        )
    return found


def up_to(n: int, name: str, split: str = "test", seed: int = 0, *, fillers: int | None = None) -> list[Question]:
    """``n`` different questions of one skill, or as many as its split has."""
    skill = skills.find(name)
    if fillers is not None and name != "recall":
        raise CanopyError(f"fillers={fillers} goes with skill='recall', and the skill is {name!r}; leave one out")
    levels = range(skill.levels) if fillers is None else [_level_of(fillers)]
    seen: set[tuple] = set()
    streams = [
        _new_questions(_drawer(name, level, split, fillers), Random(f"{seed}/{split}/{name}/{level}"), seen)
        for level in levels
    ]
    found: list[Question] = []
    while len(found) < n and streams:
        for stream in list(streams):
            question = next(stream, None)
            if question is None:
                streams.remove(stream)
            elif len(found) < n:
                found.append(question)
    return found


def _level_of(fillers: int) -> int:
    """The level that a recall question with so many fillers has."""
    return next(level for level, (_, (_, most)) in enumerate(recall.LEVELS) if fillers <= most)


def _new_questions(
    draw: Callable[[Random], tuple[tuple, Question]], rng: Random, seen: set[tuple]
) -> Iterator[Question]:
    """Questions whose key is not yet in ``seen``, until a long run of draws brings no new one."""
    misses = 0
    while misses < PATIENCE:
        key, question = draw(rng)
        if key in seen:
            misses += 1
            continue
        misses = 0
        seen.add(key)
        yield question


def _drawer(name: str, level: int, split: str, fillers: int | None) -> Callable[[Random], tuple[tuple, Question]]:
    """A function that draws one question, with its canonical key."""

    def single(rng: Random) -> tuple[tuple, Question]:
        draft = skills.draw(rng, split, name, level)
        return draft.key, Question(name, level, ((draft.question, draft.answer),))

    def filler(rng: Random) -> recall.Exchange:
        draft = skills.draw(rng, split, skills.draw_skill(rng), skills.draw_level(rng))
        return draft.question, draft.answer

    def chat(rng: Random) -> tuple[tuple, Question]:
        if fillers is not None:
            memos, turns = recall.memos_for(fillers), fillers
        else:
            memos, turns = (between(rng, *bounds) for bounds in recall.LEVELS[level])
        key, exchanges = recall.conversation(rng, split, memos, turns, filler)
        return key, Question(name, level, exchanges)

    return chat if name == "recall" else single
