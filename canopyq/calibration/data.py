"""Calibration data: whatever the caller has, as batches of token ids and which of them are real."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.errors import CanopyError, shown

LENGTH = 512  # tokens that are taken of a text
ROWS = 8  # texts in a batch
MOST = 10**7  # tokens of a text


@dataclass(frozen=True)
class Batch:
    """Some samples side by side.

    Attributes:
        ids: (B, T) int64.
        real: (B, T) bool; False where padding fills a row up.
    """

    ids: Tensor
    real: Tensor

    @property
    def arguments(self) -> dict[str, Tensor]:
        """What a transformers model is called with."""
        return {"input_ids": self.ids} | ({} if bool(self.real.all()) else {"attention_mask": self.real.long()})


def read_batches(data: Any, model: nn.Module, tokenizer=None, length: int | None = None) -> list[Batch]:
    """Batches from any of three kinds of data, checked against the model before anything runs.

    Args:
        data: texts (with a ``tokenizer``); or batches of token ids (B, T); or what a tokenizer returns, with
            ``input_ids`` and an ``attention_mask`` that is 0 at pads; or `Batch`es.
        model: that the ids are for.
        tokenizer: of the model.
        length: every text has to have so many tokens and is cut there. None cuts at 512, or at the model's context if
            that is shorter, and takes shorter texts as they are.

    Raises:
        CanopyError: for no data, an empty text or one shorter than ``length``, ids that the model's vocabulary does
            not have, rows longer than its context, and anything that is none of the three.
    """
    if getattr(checks.loaded("model", model), "config", None) is None and not _takes_ids(model):
        raise CanopyError(
            f"model is {shown(model)} without an embedding, and the data is token ids; give a language model"
        )
    items = [data] if isinstance(data, (str, Tensor, Mapping)) else list(data) if isinstance(data, Iterable) else [data]
    if not items:
        raise CanopyError("the calibration data is empty; give batches of token ids (B, T), or texts with a tokenizer")
    if all(isinstance(item, str) for item in items):
        batches = _from_texts(items, tokenizer, length, checks.context(model))
        for batch in batches:
            checks.tokens("the calibration data", batch.ids, model)
    else:
        batches = [_from_ids(item, model) for item in items]
    if not any(bool(batch.real.any()) for batch in batches):
        raise CanopyError("the calibration data is all padding; give rows with tokens")
    return batches


def _from_texts(texts: Sequence[str], tokenizer, length: int | None, limit: int | None) -> list[Batch]:
    """Texts of about the same length together, filled up at the right, where causal attention cannot see it."""
    if tokenizer is None:
        raise CanopyError("the calibration data is texts, str, and there is no tokenizer; pass the model's own too")
    checks.tokenizer(tokenizer)
    if length is not None:
        checks.count("length", length, 1, limit or MOST)
    most = length or min(LENGTH, limit or LENGTH)
    rows = [torch.tensor(tokenizer.encode(text)[:most], dtype=torch.int64) for text in texts]
    for number, row in enumerate(rows):
        if not len(row):
            raise CanopyError(f"calibration text {number} is empty; leave it out")
        if length is not None and len(row) < length:
            raise CanopyError(
                f"calibration text {number} has {len(row)} tokens, fewer than {length}; join short texts, or ask for "
                "a smaller length"
            )
    rows.sort(key=len)
    return [_pad(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]


def _pad(rows: list[Tensor]) -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([[len(row)] for row in rows])
    return Batch(ids, torch.arange(ids.shape[1]) < lengths)


def _from_ids(item: object, model: nn.Module) -> Batch:
    if isinstance(item, Batch):
        return item
    mask = None
    if isinstance(item, Mapping):
        item, mask = item.get("input_ids"), item.get("attention_mask")
    ids = checks.tokens("the calibration data", item, model).long()
    if mask is None:
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise CanopyError(f"attention_mask is {shown(mask)}; give it the shape of its ids {tuple(ids.shape)}")
    return Batch(ids, checks.with_values("attention_mask", mask) != 0)


def _takes_ids(model: nn.Module) -> bool:
    return any(isinstance(part, nn.Embedding) for part in model.modules())
