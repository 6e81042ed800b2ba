"""The endless chat that the model trains on: questions of all skills, memos told, and memos asked for.

Chats to calibrate on are cut from such ones of the validation split, so that no question which is scored is among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING

from canopyq import checks
from canopyq.tutor import recall, skills
from canopyq.tutor.chat import Turn, encode
from canopyq.tutor.draws import pick
from canopyq.tutor.reading import LONGEST, draw_passage, first_question
from canopyq.tutor.world import THINGS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

RECALL_SHARE = 0.25  # of the turns, once something was told
FOLLOW_UP = 0.7  # how likely another question about the same passage is
MEMOS = 10  # that a chat to calibrate on may hold
MOST = 100_000  # chats, tokens or rows


def _tell_share(told: int) -> float:
    """A chat likes to begin with a memo; later ones come now and then."""
    if told == 0:
        return 0.55
    return 0.18 if told < 3 else 0.12


def chat(rng: Random, split: str = "train", memos: int = 12) -> Iterator[recall.Exchange]:
    """An endless chat in which up to ``memos`` facts are told, each asked for at any later time.

    Passages speak of things that no earlier one did as long as there are any, so that a question has one answer.
    """
    names = rng.sample(recall.MEMO_NAMES, memos)
    told: dict[str, str] = {}
    things = list(THINGS)
    while True:
        if len(told) < memos and rng.random() < _tell_share(len(told)):
            name = names[len(told)]
            told[name] = recall.MEMOS[name](rng)
            yield recall.tell(rng, name, told[name])
        elif told and rng.random() < RECALL_SHARE:
            name = pick(rng, names[: len(told)])
            if recall.split_of_recall(told, name) == split:
                yield recall.remind(rng, name, told[name])
        else:
            yield from _question(rng, split, things)


def _question(rng: Random, split: str, things: list[str]) -> Iterator[recall.Exchange]:
    """One question, and after a passage perhaps some more about it; what it speaks of is taken out of ``things``."""
    name, level = skills.draw_skill(rng), skills.draw_level(rng)
    if name != "reading":
        draft = skills.draw(rng, split, name, level)
        yield draft.question, draft.answer
        return
    if len(things) < LONGEST:
        things[:] = THINGS
    while True:
        passage = draw_passage(rng, level, things)
        draft = first_question(rng, passage)
        if draft.split == split:
            break
    things[:] = [thing for thing in things if thing not in passage.things]
    yield draft.question, draft.answer
    while rng.random() < FOLLOW_UP:
        yield passage.ask(rng)


def calibration(
    tokenizer: PreTrainedTokenizerBase, n: int = 64, length: int = 512, seed: int = 0, *, rows: int = 8
) -> list[Tensor]:
    """``n`` chats of ``length`` tokens each, as batches of token ids (``rows``, ``length``): nothing is padded.

    Each is one long chat about all skills, cut where it is full. The same seed gives the same chats, and the first
    ones do not depend on ``n``.

    Raises:
        CanopyError: for numbers that are not between 1 and `MOST`.
    """
    import torch

    checks.tokenizer(tokenizer), checks.count("seed", seed)
    for name, value in {"n": n, "length": length, "rows": rows}.items():
        checks.count(name, value, 1, MOST)
    chats = [_chat(tokenizer, length, Random(f"{seed}/calibration/{number}")) for number in range(n)]
    return list(torch.tensor(chats).split(rows))


def _chat(tokenizer: PreTrainedTokenizerBase, length: int, rng: Random) -> list[int]:
    turns: list[Turn] = []
    tokens = 0
    for turn in chat(rng, "val", MEMOS):
        turns.append(turn)
        tokens += sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in turn)
        if tokens >= length:
            break
    return encode(tokenizer, turns)[0][:length]
