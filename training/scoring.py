"""Examining the model while it trains: is every token of the answer the one that it finds most likely?

This is the same as letting it write the answer: as long as each token is right, the next one is predicted from the
right text. But all tokens are checked in one pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from canopyq.tutor import skills
from canopyq.tutor.chat import encode
from canopyq.tutor.exam import up_to
from training.tokenizer import PAD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTHS = (128, 512, 2048)  # chats are padded to one of these, so that compiled code sees few shapes
FILLERS = (0, 8, 24, 50)  # how far back recall is examined
NO_ANSWER = -1


class Case(NamedTuple):
    """One encoded question. Its group is its skill, and for recall also the number of fillers, as in "recall@24"."""

    group: str
    ids: list[int]
    answer_start: int


def cases(tokenizer: PreTrainedTokenizerBase, split: str, n: int) -> list[Case]:
    """Up to ``n`` questions of every skill, and as many of recall at each distance."""
    groups = {name: up_to(n, name, split) for name in skills.SINGLE_TURN}
    groups |= {f"recall@{fillers}": up_to(n, "recall", split, fillers=fillers) for fillers in FILLERS}
    return [Case(group, *encode(tokenizer, question.turns)) for group, drawn in groups.items() for question in drawn]


def examine(
    predict: Callable[[Tensor], Tensor], examined: Sequence[Case], device: torch.device, tokens: int
) -> dict[str, tuple[int, int]]:
    """For every group how many answers are right, of how many.

    ``predict`` maps ids [rows, length] to the most likely next ids of the same shape; a batch has ``tokens`` tokens.
    """
    score: dict[str, list[bool]] = defaultdict(list)
    shorter = 0
    for length in LENGTHS:
        fitting = [case for case in examined if shorter < len(case.ids) <= length]
        rows = max(1, tokens // length)
        for start in range(0, len(fitting), rows):
            batch = fitting[start : start + rows]
            ids = torch.full((rows, length), PAD)
            expected = torch.full((rows, length), NO_ANSWER)
            for row, case in enumerate(batch):
                ids[row, : len(case.ids)] = torch.tensor(case.ids)
                graded = slice(case.answer_start - 1, len(case.ids) - 1)
                expected[row, graded] = torch.tensor(case.ids[case.answer_start :])
            expected = expected.to(device)
            with torch.no_grad():
                right = (predict(ids.to(device)) == expected) | (expected == NO_ANSWER)
            for case, hit in zip(batch, right.all(1).tolist(), strict=False):  # rows after the last case are padding
                score[case.group].append(hit)
        shorter = length
    return {group: (sum(score[group]), len(score[group])) for group in dict.fromkeys(c.group for c in examined)}
