"""Training batches: rows of one endless chat each, cut to one length.

Batch number b is drawn from a random stream of its own, seeded by (seed, b). So it does not matter which worker process
makes it or when: the same seed gives the same batches in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from canopyq.tutor import stream
from canopyq.tutor.draws import pick
from training.tokenizer import BOS, BOT, END, USER, CachedEncoder

# Until this share of the steps, rows are of these lengths. Short rows teach the skills fast; recall over a long chat
# appears only with long rows.
CURRICULUM = ((0.3, (128, 256)), (0.7, (256, 512, 512)), (1.0, (128, 512, 2048, 2048)))
MEMOS = {128: 3, 256: 5, 512: 10, 1024: 16, 2048: 24}  # how many memos a chat of that length may hold


@dataclass(frozen=True)
class Batches(torch.utils.data.Dataset):
    """``batches[step]`` is (token ids, which of them belong to an answer), both of shape [rows, length + 1]."""

    encoder: CachedEncoder
    steps: int
    tokens: int = 65_536
    seed: int = 0
    longest: int = 2048

    def __len__(self) -> int:
        return self.steps

    def lengths(self) -> list[int]:
        """Every row length that occurs, shortest first."""
        return sorted({min(length, self.longest) for _, lengths in CURRICULUM for length in lengths})

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        rng = Random(f"{self.seed}/batch/{step}")
        lengths = next(lengths for until, lengths in CURRICULUM if step < until * self.steps)
        return self.draw(rng, min(pick(rng, lengths), self.longest))

    def draw(self, rng: Random, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of rows of that length."""
        rows = [self._row(rng, length + 1) for _ in range(self.tokens // length)]
        ids = np.array([ids for ids, _ in rows], dtype=np.int16)  # the vocabulary fits, and workers send half the bytes
        in_answer = np.frombuffer(b"".join(bytes(marks) for _, marks in rows), dtype=np.bool_).reshape(ids.shape)
        return torch.from_numpy(ids), torch.from_numpy(in_answer.copy())

    def _row(self, rng: Random, length: int) -> tuple[list[int], bytearray]:
        """<bos>, then turns of one chat until the row is full, and a 1 at every token of an answer."""
        encode, ids, in_answer = self.encoder, [BOS], bytearray(1)
        for question, answer in stream.chat(rng, "train", MEMOS[length - 1]):
            ids.append(USER)
            ids += encode(question)
            ids.append(BOT)
            in_answer += bytes(len(ids) - len(in_answer))
            ids += encode(answer)
            ids.append(END)
            in_answer += b"\1" * (len(ids) - len(in_answer))
            if len(ids) >= length:
                break
        return ids[:length], in_answer[:length]


def loader(batches: Batches, workers: int, pin_memory: bool) -> torch.utils.data.DataLoader:
    """The batches in order, made ahead of time by worker processes."""
    return torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
    )
