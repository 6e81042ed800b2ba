"""The question generator: deterministic, right, and honest about what is held out."""

from __future__ import annotations

import re
from collections import Counter
from datetime import date, timedelta
from random import Random

import pytest

from canopyq.errors import CanopyError
from canopyq.tutor import knowledge, letters, numbers, recall, skills, stream
from canopyq.tutor.dates import AHEAD, BACK
from canopyq.tutor.draws import FEWEST_PHRASINGS, SPLITS, split_of_phrasing
from canopyq.tutor.exam import Question, questions, up_to
from canopyq.tutor.world import COURSES, DAYS, GLOSSARY, MONTHS, WORDS


def ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def letters_in(text: str) -> list[str]:
    return max(re.findall(r"[a-z](?:-[a-z])+", text), key=len).split("-")


def solve_add(prompt: str) -> str:
    return f"{sum(ints(prompt))}."


def solve_subtract(prompt: str) -> str:
    return f"{max(ints(prompt)) - min(ints(prompt))}."


def solve_multiply(prompt: str) -> str:
    a, b = ints(prompt)
    return f"{a * b}."


SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
METRES = {"mm": 1, "cm": 10, "m": 1000, "km": 1_000_000}
OTHERS = {"g": 1, "kg": 1000, "bits": 1, "bytes": 8, "KB": 8000, "cents": 1, "euros": 100}
BASE = SECONDS | METRES | OTHERS


def solve_convert(prompt: str) -> str:
    ask = re.match(
        r"How many (?P<to>\w+) are in (?P<n>\d+) (?P<of>\w+)\?|Convert (?P<n2>\d+) (?P<of2>\w+) to (?P<to2>\w+)\."
        r"|(?P<n3>\d+) (?P<of3>\w+) is how many (?P<to3>\w+)\?",
        prompt,
    )
    assert ask
    n, of, to = (ask[name] or ask[name + "2"] or ask[name + "3"] for name in ("n", "of", "to"))
    value, rest = divmod(int(n) * BASE[of], BASE[to])
    assert rest == 0
    return f"{value} {to}."


def solve_compare(prompt: str) -> str:
    return f"{(max if 'largest' in prompt or 'maximum' in prompt else min)(ints(prompt))}."


def solve_sort(prompt: str) -> str:
    return ", ".join(str(n) for n in sorted(ints(prompt))) + "."


def solve_sequence(prompt: str) -> str:
    *_, before, last = ints(prompt)
    return f"{last + last - before}."


def solve_model_size(prompt: str) -> str:
    size, name = re.search(r"(\d+)[BM]\b", prompt), re.search(r"(?:FP|BF|INT)(\d+)", prompt)
    assert size and name
    unit = "GB" if "B" in prompt[size.end() - 1] else "MB"
    return f"{int(size[1]) * int(name[1]) / 8:g} {unit}."


def solve_weekday(prompt: str) -> str:
    (n,) = ints(prompt)
    (day,) = (i for i, name in enumerate(DAYS) if name in prompt)
    back = any(word in prompt for word in ("was", "before", "back", "earlier", "precedes"))
    result = date(2024, 1, 1) + timedelta(days=day + (-n if back else n))  # 1 January 2024 was a Monday
    weeks, days = f"{n // 7} week" + "s" * (n // 7 != 1), f"{n % 7} day" + "s" * (n % 7 != 1)
    return f"{weeks} and {days}: {result:%A}."


def solve_date(prompt: str) -> str:
    n, day = ints(prompt)
    (month,) = (i for i, name in enumerate(MONTHS, start=1) if name in prompt)
    result = date(2023, month, day) + timedelta(days=n)
    return f"{MONTHS[result.month - 1]} {result.day}."


def solve_spell(prompt: str) -> str:
    (word,) = (w for w in re.findall("[a-z]+", prompt) if w in WORDS)
    return "-".join(word) + "."


def solve_reverse(prompt: str) -> str:
    return "-".join(letters_in(prompt)[::-1]) + "."


def solve_count(prompt: str) -> str:
    letter = re.search(r"times is (\w) in|letter (\w) in", prompt)
    assert letter
    return f"{letters_in(prompt).count(letter[1] or letter[2])}."


def solve_facts(prompt: str) -> str:
    (course,) = (c for c in COURSES if c.code in prompt)
    clues = {"room": "oom|[Ww]here", "day": "day|Day|When", "teacher": "ecturer|eache|Whose", "credits": "redits"}
    (attribute,) = (name for name, clue in clues.items() if re.search(clue, prompt))
    return f"{getattr(course, attribute)}."


def solve_glossary(prompt: str) -> str:
    term = max((t for t in GLOSSARY if re.search(rf"\b{t}\b", prompt)), key=len)
    return GLOSSARY[term]


def solve_reading(prompt: str) -> str:
    *story, ask = re.split(r"(?<=\.) ", prompt)
    verb = {"Where": "is in the", "Whose": "belongs to", "What": "has a"}[ask.split()[0]]
    (thing,) = re.findall(r"the (\w+)\?$", ask)
    (sentence,) = (s for s in story if s.startswith(f"The {thing} {verb} "))
    return sentence


def solve_recall(turns: tuple[tuple[str, str], ...]) -> str:
    asked = re.search(r"my ([a-z' ]+?)[.?]", turns[-1][0])
    assert asked
    told = [m[1] for user, _ in turns[:-1] if (m := re.search(rf"[Mm]y {asked[1]} is (\w+)\.$", user))]
    assert len(told) == 1
    return told[0] + "."


@pytest.mark.parametrize("name", skills.SINGLE_TURN)
def test_answers_are_right(name: str) -> None:
    solve = globals()[f"solve_{name}"]
    for split in SPLITS:
        for question in up_to(48, name, split):
            assert question.answer == solve(question.prompt), question


def test_recall_answers_are_right() -> None:
    for question in up_to(60, "recall"):
        assert question.answer == solve_recall(question.turns)


def test_chat_answers_are_right() -> None:
    """Follow-up questions and memos, which only the training chat has, agree with what was said before."""
    exchanges = [e for _, e in zip(range(3000), stream.chat(Random(3)), strict=False)]
    story = ""
    for i, (user, answer) in enumerate(exchanges):
        if re.match(r"(Where|Whose|What colour) is the ", user):
            assert answer == solve_reading(f"{story} {user}")
        elif re.match(r"The \w+ (is in the|belongs to|has a) ", user):
            story = user[: user.rindex(".") + 1]
        elif re.search(r"what is my|What is my|I told you", user):
            assert answer == solve_recall(tuple(exchanges[: i + 1]))


def test_same_seed_same_questions() -> None:
    assert questions(100) == questions(100)
    assert questions(100) != questions(100, seed=1)
    assert questions(30, "sort")[:10] == questions(10, "sort")


def test_questions_spread_over_skills_and_levels() -> None:
    drawn = questions(204)
    assert set(Counter(q.skill for q in drawn).values()) == {12} and len({q.skill for q in drawn}) == 17
    assert Counter(q.level for q in drawn if q.skill == "sort") == {0: 4, 1: 4, 2: 4}
    assert len({q.turns for q in drawn}) == 204
    assert len(questions(5)) == 5 and questions(0) == []


def test_last_turn_is_graded() -> None:
    question = Question("add", 0, (("Note that my desk is 12.", "Noted."), ("What is 1 + 2?", "3.")))
    assert (question.prompt, question.answer) == ("What is 1 + 2?", "3.")


@pytest.mark.parametrize("fillers", [0, 8, 9, 50])
def test_recall_with_a_given_distance(fillers: int) -> None:
    for question in questions(5, "recall", fillers=fillers):
        told = sum(answer == recall.NOTED for _, answer in question.turns)
        assert len(question.turns) == told + fillers + 1
        assert recall.LEVELS[question.level][1][0] <= fillers <= recall.LEVELS[question.level][1][1]


@pytest.mark.parametrize("name", skills.SINGLE_TURN)
def test_splits_share_no_question(name: str) -> None:
    """The same canonical question always falls into the same split."""
    rng, split_by_key = Random(name), {}
    for i in range(6000):
        draft = skills.SKILLS[name].draw(rng, i % 3)
        assert split_by_key.setdefault(draft.key, draft.split) == draft.split
    shares = Counter(split_by_key.values())
    assert shares["train"] > shares["test"] > 0 and shares["val"] > 0


def test_training_chats_hold_no_test_question() -> None:
    held_out = {q.prompt for name in skills.SINGLE_TURN for split in ("test", "val") for q in up_to(60, name, split)}
    chat = stream.chat(Random(11))
    assert not any(next(chat)[0] in held_out for _ in range(6_000))


PHRASED = {
    **{("spell", word): letters.SPELL for word in WORDS},
    **{("define", term): knowledge.DEFINE for term in GLOSSARY},
    **{("fact", c.code, attribute): knowledge.FACTS[attribute] for c in COURSES for attribute in knowledge.FACTS},
    **{("multiply", a, b): numbers.MULTIPLY for a in range(2, 10) for b in range(2, 13)},
    **{("weekday", day, n): AHEAD if n > 0 else BACK for day in range(7) for n in range(-6, 7) if n},
}


def test_every_item_keeps_phrasings_to_train_on() -> None:
    for item, phrasings in PHRASED.items():
        splits = Counter(split_of_phrasing(item, i, len(phrasings)) for i in range(len(phrasings)))
        assert splits["train"] >= 2 and splits["test"] == 2 and splits["val"] == 1, item
    with pytest.raises(ValueError, match=f"at least {FEWEST_PHRASINGS}"):
        split_of_phrasing(("spell", "word"), 0, FEWEST_PHRASINGS - 1)


def test_held_out_phrasings_are_those_items() -> None:
    """Every item is really drawn in training, in as many phrasings as it keeps."""
    rng, drawn = Random(0), Counter()
    for name in ("spell", "glossary", "facts"):
        keys = {skills.draw(rng, "train", name, 0).key for _ in range(40_000)}
        drawn.update(key[:-1] for key in keys)
    assert all(drawn[item] >= 2 for item in PHRASED if item[0] in ("spell", "define", "fact"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: questions(10, "sorting"), "unknown skill 'sorting'; did you mean 'sort'"),
        (lambda: questions(10, split="tests"), "unknown split 'tests'; did you mean 'test'?"),
        (lambda: questions(100, "glossary"), "skill 'glossary' has 48 questions in its test split, not 100"),
        (lambda: questions(1000), "ask for fewer"),
        (lambda: questions(10**9), "ask for fewer"),  # before drawing them
        (lambda: questions(10, "add", fillers=3), "fillers=3 goes with skill='recall'"),
        (lambda: questions(10, "recall", fillers=51), "fillers=51"),
        (lambda: questions(10, fillers=3), "fillers=3 goes with skill='recall'"),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(CanopyError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)
