"""The capstone: a checkpoint that meets a budget and a floor, and that a server takes. The check reads it from disk."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from canopyq.errors import CanopyError
from canopyq.memory import human

from .diagnose import Finding
from .exercise import ExerciseCard
from .store import store

ID = "11-capstone"


@dataclass(frozen=True)
class Capstone:
    """What is asked for, and the texts of its card.

    Attributes:
        budget: bytes that all safetensors files may take together.
        floor: the least share of right answers.
        questions, seed: which held-out questions are put.
    """

    budget: int = 4_700_000
    floor: float = 0.97
    questions: int = 102
    seed: int = 11
    id: str = ID
    title: str = "A checkpoint of your own"
    minutes: int = 15
    difficulty: int = 4
    stub: str = "folder = None\n"
    solution: str = """\
model, tokenizer = cq.tutor.load()
cq.quantize_(model, "w4a16-channel")
cq.save(model, "out/capstone", tokenizer)
folder = "out/capstone"
"""
    hints: tuple[str, str, str] = (
        "The budget is for the file. How many bits may a weight of the blocks take, if the embedding stays as it is?",
        "`w4a16-g128` is a little too large, so there have to be fewer scales. Groups of 256 have half as many, but of "
        "vLLM's kernels only the newest takes them. What do all read that has fewer still?",
        'Load the tutor anew, `cq.quantize_(model, "w4a16-channel")`, a scale a row, then '
        '`cq.save(model, "out/capstone", tokenizer)`.',
    )

    @property
    def task(self) -> str:
        return f"""
Canopy has room for **{human(self.budget)}**, at least **{100 * self.floor:.0f} %** of the answers have to be right, and
its server is vLLM, which has to take the file as it is.

- Find a recipe for the tutor that meets all three.
- Build it: load the tutor, quantize it, save it with `cq.save` to a folder of your own, such as `out/capstone`.
- Set `folder` to it and run the check. It adds up the bytes on disk, asks `cq.inspect` whether vLLM takes them, loads
  the checkpoint in this process, and puts {self.questions} held-out questions that this lesson has not used.
"""


class CapstoneCard(ExerciseCard):
    """An exercise whose answer is a folder on disk."""

    css = "canopyq-capstone"

    def __init__(self, spec: Capstone) -> None:
        self.spec = spec
        self._started()

    def _started(self) -> float:
        """When this reader saw the card for the first time: what was saved before is not theirs."""
        known = store().get("exercises", ID).get("started")
        if known is None:
            known = float(int(time.time()))
            store().record("exercises", ID, started=known)
        return known

    def judge(self, folder: Any) -> Finding:
        """What is to be said about a folder."""
        return examine_folder(folder, self.spec, self._started())


def capstone() -> CapstoneCard:
    """The card of the capstone of lesson 11."""
    return CapstoneCard(Capstone())


def examine_folder(folder: Any, spec: Capstone, started: float) -> Finding:
    """Judge a checkpoint: whose it is, its bytes, and its answers."""
    if folder is None:
        return Finding("todo", "Not attempted yet", "Set `folder` to where you saved your checkpoint.")
    if not isinstance(folder, (str, os.PathLike)):
        kind = type(folder).__name__
        return _form(f'`check` needs the folder that you saved to, such as `"out/capstone"`, not a {kind}.')
    place = Path(os.path.expanduser(folder))
    for problem in (_not_a_checkpoint, _not_mine):
        if (finding := problem(place, started)) is not None:
            return finding
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    if size > spec.budget:
        return _mistake(
            "too large",
            f"Its files take {size:,} bytes, {size - spec.budget:,} over the budget of {spec.budget:,}. Fewer bits, or "
            "fewer scales: what does each group cost?",
        )
    return _not_served(place) or _answers(place, size, spec)


def _not_a_checkpoint(place: Path, started: float) -> Finding | None:
    import canopyq.tutor as tutor

    if not place.exists():
        return _form(f'There is no folder `{place}`. Save your model first: `cq.save(model, "{place}", tokenizer)`.')
    if not place.is_dir():
        return _form(f"`{place}` is a file. Give the folder that `cq.save` wrote, with config.json in it.")
    if place.resolve() == tutor.path().resolve():
        return _mistake("the original", "This is the tutor itself, in 16 bits. Load it, quantize it, save the result.")
    if not (place / "config.json").is_file() or not any(place.glob("*.safetensors")):
        return _form(f"`{place}` holds no checkpoint: no config.json, or no safetensors file. Write it with `cq.save`.")
    return None


def _not_mine(place: Path, started: float) -> Finding | None:
    from canopyq.checkpoint.files import Checkpoint
    from canopyq.checkpoint.headers import read_json
    from canopyq.checkpoint.save import NOTE
    from canopyq.tutor import path

    try:
        config = Checkpoint(place).config
        original = read_json(path() / "config.json")
        note = read_json(place / NOTE) if (place / NOTE).is_file() else None
        saved = None if note is None else datetime.fromisoformat(note["date"]).timestamp()
    except (CanopyError, KeyError, TypeError, ValueError) as error:
        return Finding("error", "The checkpoint is damaged", f"{error}")
    if not config.get("quantization_config"):
        return _mistake(
            "not a quantized checkpoint",
            "Its config names no quantization: the weights are as they were. Call `cq.quantize_(model, recipe)` before "
            "you save.",
        )
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    if any(config.get(key) != original[key] for key in sizes):
        return _mistake(
            "another model",
            "This checkpoint is quantized, but it is not the tutor: its layers have other sizes. Start from "
            "`cq.tutor.load()`.",
        )
    if saved is None:
        return _mistake(
            "not saved by cq.save",
            f"There is no {NOTE} in it, which `cq.save` writes when it has read a checkpoint back and compared. Save "
            "yours with `cq.save`.",
        )
    if saved < started:
        return _mistake(
            "an older file",
            f"It was saved on {note['date']}, before this capstone began: the file of another lesson, or of somebody "
            "else. Build your own, into a new folder.",
        )
    return None


def _not_served(place: Path) -> Finding | None:
    from canopyq.checkpoint.inspect import inspect

    try:
        verdict = inspect(place).tools["vLLM"]
    except CanopyError as error:
        return Finding("error", "The checkpoint is damaged", f"{error}")
    if verdict.startswith("yes"):
        return None
    return _mistake(
        "the server does not take it as it is",
        f"It is small enough, but what vLLM makes of it is: {verdict}. The command below this card would fail. Which "
        "scales do servers read?",
    )


def _answers(place: Path, size: int, spec: Capstone) -> Finding:
    from canopyq.checkpoint.load import load
    from canopyq.evaluate.quality import compare
    from canopyq.tutor.exam import questions
    from canopyq.tutor.loading import load_folder, path

    original, tokenizer = load_folder(path())
    try:
        model = load(place)
    except CanopyError as error:
        return Finding("error", "The checkpoint cannot be loaded", f"{error}")
    asked = [q for q in questions(spec.questions, seed=spec.seed) if len(q.turns) < 10]
    try:
        result = compare(original, model, tokenizer, asked)
    except CanopyError as error:
        return Finding("error", "The checkpoint cannot answer", f"{error}")
    share = result.model.accuracy
    told = f"{size:,} of {spec.budget:,} bytes, {share} of {share.n} answers right, KL {result.kl:.2g}"
    if share.value < spec.floor:
        worst = min(result.model.skills.items(), key=lambda item: item[1].value)
        return _mistake(
            "accuracy below the floor",
            f"It is small enough, but only {share} of its answers are right, and {100 * spec.floor:.0f} % are asked "
            f"for (worst: {worst[0]}, {worst[1].right} of {worst[1].n}). More bits, or finer scales for the same bits.",
        )
    return Finding("passed", "Passed", f"Yours: {told}. Read from disk, loaded and examined.")


def _form(message: str) -> Finding:
    return Finding("form", "Not right yet", message)


def _mistake(name: str, message: str) -> Finding:
    return Finding("mistake", name, message)
