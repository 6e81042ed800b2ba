"""Skills about the calendar: the day of the week and the date some days away."""

from __future__ import annotations

from random import Random

from canopyq.tutor.draws import Draft, between, pick, split_of, split_of_phrasing
from canopyq.tutor.world import DAYS, MONTH_DAYS, MONTHS

AHEAD = (
    "Today is {day}. What day is it in {n} days?",
    "Which day comes {n} days after {day}?",
    "Count {n} days forward from {day}.",
    "If it is {day} now, what day will it be {n} days later?",
    "My exam is {n} days after {day}. Which day is that?",
    "What day follows {day} by {n} days?",
)
BACK = (
    "Today is {day}. What day was it {n} days ago?",
    "Which day comes {n} days before {day}?",
    "Count {n} days back from {day}.",
    "If it is {day} now, what day was it {n} days earlier?",
    "I enrolled {n} days before {day}. Which day was that?",
    "What day precedes {day} by {n} days?",
)
DATE = (
    "My essay is due {n} days after {month} {day}. Which date is that?",
    "What date is {n} days after {month} {day}?",
)


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def weekday(rng: Random, level: int) -> Draft:
    """The answer shows its step, whole weeks and the rest: without it the model did not learn to answer.

    Fewer than 7 days is a small table that is known by heart: there only the phrasing is held out.
    """
    day, n = between(rng, 0, 6), between(rng, *((1, 13), (14, 27), (28, 90))[level])
    sign, phrasings = (1, AHEAD) if rng.random() < 0.5 else (-1, BACK)
    index = int(rng.random() * len(phrasings))
    weeks, days = divmod(n, 7)
    question = phrasings[index].format(day=DAYS[day], n=n)
    answer = f"{_counted(weeks, 'week')} and {_counted(days, 'day')}: {DAYS[(day + sign * n) % 7]}."
    key = ("weekday", day, sign * n)
    if weeks == 0:
        return Draft((*key, index), split_of_phrasing(key, index, len(phrasings)), question, answer)
    return Draft(key, split_of(key), question, answer)


def date(rng: Random, level: int) -> Draft:
    """A date up to 20 days later, in a year whose February has 28 days."""
    month = between(rng, 0, 11)
    day, n = between(rng, 1, MONTH_DAYS[month]), between(rng, *((2, 5), (6, 10), (11, 20))[level])
    key = ("date", month, day, n)
    question = pick(rng, DATE).format(n=n, month=MONTHS[month], day=day)
    later = day + n
    if later > MONTH_DAYS[month]:
        later, month = later - MONTH_DAYS[month], (month + 1) % 12
    return Draft(key, split_of(key), question, f"{MONTHS[month]} {later}.")
