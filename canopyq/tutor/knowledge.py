"""Skills about what the model knows by heart: the course catalogue and a glossary of quantization.

An item that was never trained on cannot be known, so both hold out phrasings only. Neither has levels.
"""

from __future__ import annotations

from random import Random

from canopyq.tutor.draws import Draft, pick, split_of_phrasing
from canopyq.tutor.world import COURSES, GLOSSARY

FACTS = {
    "room": (
        "In which room is {code}?",
        "Where does {code} meet?",
        "What is the room of {code}?",
        "I am lost, where is {code} held?",
        "Tell me the room for {code}.",
        "Room of {code}?",
    ),
    "day": (
        "On which day is {code}?",
        "When does {code} meet?",
        "What day is {code} taught?",
        "Tell me the day of {code}.",
        "Which weekday is {code} on?",
        "Day of {code}?",
    ),
    "teacher": (
        "Who teaches {code}?",
        "Who is the teacher of {code}?",
        "Which lecturer gives {code}?",
        "Tell me who teaches {code}.",
        "Whose course is {code}?",
        "Teacher of {code}?",
    ),
    "credits": (
        "How many credits is {code}?",
        "What is {code} worth in credits?",
        "How many credits do I get for {code}?",
        "Tell me the credits for {code}.",
        "What credits does {code} give?",
        "Credits of {code}?",
    ),
}
ATTRIBUTES = tuple(FACTS)

DEFINE = (
    "What is {term}?",
    "Explain {term}.",
    "Define {term}, please.",
    "In one sentence, what is {term}?",
    "What does the word mean: {term}?",
    "Tell me what {term} is.",
    "I forgot what {term} is. Help me.",
    "Give a definition: {term}.",
)
TERMS = tuple(GLOSSARY)


def fact(rng: Random, level: int) -> Draft:
    """The room, day, teacher or credits of a course."""
    course, attribute = pick(rng, COURSES), pick(rng, ATTRIBUTES)
    phrasings = FACTS[attribute]
    index = int(rng.random() * len(phrasings))
    item = ("fact", course.code, attribute)
    split = split_of_phrasing(item, index, len(phrasings))
    return Draft((*item, index), split, phrasings[index].format(code=course.code), getattr(course, attribute) + ".")


def define(rng: Random, level: int) -> Draft:
    """One sentence about a term."""
    term = pick(rng, TERMS)
    index = int(rng.random() * len(DEFINE))
    split = split_of_phrasing(("define", term), index, len(DEFINE))
    return Draft(("define", term, index), split, DEFINE[index].format(term=term), GLOSSARY[term])
