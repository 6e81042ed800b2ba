"""Chats to calibrate on: drawn from the validation split, so that no question which is scored is among them."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from canopyq.errors import CanopyError
from canopyq.tutor import stream
from canopyq.tutor.chat import Turn, encode

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MEMOS = 10  # that a chat may hold
MOST = 100_000


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

    if not all(type(count) is int and 1 <= count <= MOST for count in (n, length, rows)):
        raise CanopyError(
            f"cannot draw {n} chats of {length} tokens, {rows} a batch; each is a number from 1 to {MOST:,}"
        )
    chats = [_chat(tokenizer, length, Random(f"{seed}/calibration/{number}")) for number in range(n)]
    return list(torch.tensor(chats).split(rows))


def _chat(tokenizer: PreTrainedTokenizerBase, length: int, rng: Random) -> list[int]:
    turns: list[Turn] = []
    tokens = 0
    for turn in stream.chat(rng, "val", MEMOS):
        turns.append(turn)
        tokens += sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in turn)
        if tokens >= length:
            break
    return encode(tokenizer, turns)[0][:length]
