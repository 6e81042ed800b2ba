"""``lessons.progress()`` and ``lessons.strip()``: how far the reader has come, lesson by lesson."""

from __future__ import annotations

from .capstone import ID as CAPSTONE
from .checkpoints import ID as TEN_CHECKPOINTS
from .exercises import names as exercise_names
from .html import FONT, KINDS, StaticCard, box, heading, html_table, section
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


def _of_lesson(number: str, data: dict) -> tuple[list[dict], int, list[dict], int]:
    """The answers there are, of how many quizzes; the work there is, on how many exercises."""
    here = [name for name in quiz_names() if load(name).lesson == number]
    tasks = [name for name in (*exercise_names(), TEN_CHECKPOINTS, CAPSTONE) if name.startswith(number)]
    answers = [data["quizzes"][name] for name in here if name in data["quizzes"]]
    work = [data["exercises"][name] for name in tasks if name in data["exercises"]]
    return answers, len(here), work, len(tasks)


def rows() -> list[tuple[str, str, str, str, str, str]]:
    """One row a lesson, as text."""
    data = store().read()
    result = []
    for number, title in LESSONS.items():
        answers, quizzes, work, tasks = _of_lesson(number, data)
        guesses = [name for name in data["predictions"] if name.startswith(number)]
        result.append(
            (
                f"{number} {title}",
                _of(sum(a.get("right", False) for a in answers), quizzes),
                _of(len(answers), quizzes),
                _of(sum(w.get("passed", False) for w in work), tasks),
                _of(sum(w.get("solution_seen", False) for w in work), tasks),
                str(len(guesses)) if guesses else "-",
            )
        )
    return result


def strip() -> StaticCard:
    """One line for the end of every lesson: how many quizzes and exercises of each are right."""
    data = store().read()
    parts, texts = [], []
    for number, title in LESSONS.items():
        answers, quizzes, work, tasks = _of_lesson(number, data)
        done = sum(a.get("right", False) for a in answers) + sum(w.get("passed", False) for w in work)
        whole = quizzes + tasks
        texts.append(f"{number} {'done' if done == whole else f'{done} of {whole}'}")
        background, ink, edge = KINDS["good" if done == whole else "info"]
        colours = f"background:{background};color:{ink};border-color:{edge}" if done else "border-color:#868f99"
        style = f"border:1px solid;border-radius:10px;padding:1px 7px;white-space:nowrap;{colours}"
        parts.append(f'<span style="{style}" title="{title}: {done} of {whole}">{number} {done}/{whole}</span>')
    row = f'<div style="{FONT};font-size:13px;display:flex;flex-wrap:wrap;gap:4px">{"".join(parts)}</div>'
    return StaticCard(row, "your way: " + ", ".join(texts))


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
