"""``lessons.progress()``: how far the reader has come, lesson by lesson."""

from __future__ import annotations

from .capstone import ID as CAPSTONE
from .checkpoints import ID as TEN_CHECKPOINTS
from .exercises import names as exercise_names
from .html import StaticCard, box, heading, html_table, section
from .quizzes import load
from .quizzes import names as quiz_names
from .store import store
from .text import inline

LESSONS = {
    "00": "Start here",
    "01": "Precision formats",
    "02": "Symmetric and asymmetric",
    "03": "Weight quantization",
    "04": "Activation quantization",
    "05": "KV cache",
    "06": "Granularity",
    "07": "Storage",
    "08": "Failure modes",
    "09": "Better rounding",
    "10": "Speed",
    "11": "Choose",
    "12": "Your own model",
}
HEAD = ("Lesson", "Quizzes right", "Quizzes answered", "Exercises passed", "Solutions seen", "Guesses made")


def rows() -> list[tuple[str, str, str, str, str, str]]:
    """One row a lesson, as text."""
    data = store().read()
    all_quizzes = {name: load(name).lesson for name in quiz_names()}
    result = []
    for number, title in LESSONS.items():
        here = [name for name, lesson in all_quizzes.items() if lesson == number]
        answers = [data["quizzes"][name] for name in here if name in data["quizzes"]]
        tasks = [name for name in (*exercise_names(), TEN_CHECKPOINTS, CAPSTONE) if name.startswith(number)]
        work = [data["exercises"][name] for name in tasks if name in data["exercises"]]
        guesses = [name for name in data["predictions"] if name.startswith(number)]
        result.append(
            (
                f"{number} {title}",
                _of(sum(a.get("right", False) for a in answers), len(here)),
                _of(len(answers), len(here)),
                _of(sum(w.get("passed", False) for w in work), len(tasks)),
                _of(sum(w.get("solution_seen", False) for w in work), len(tasks)),
                str(len(guesses)) if guesses else "-",
            )
        )
    return result


def progress() -> StaticCard:
    """The table of all lessons: answered and right, passed, solutions seen, guesses made."""
    lines = rows()
    notice = store().notice()
    html = section(heading("Progress", "Your way through the course") + html_table(HEAD, lines))
    width = max(len(line[0]) for line in lines)
    text = [f"{line[0]:<{width}}  quizzes {line[1]:>5}  exercises {line[3]:>5}  guesses {line[5]:>2}" for line in lines]
    if notice:
        html, text = html + box("note", inline(notice)), [*text, notice]
    return StaticCard(html, "\n".join(text))


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole}" if whole else "-"
