"""Calibration data: whatever the caller has, as batches of token ids and which of them are real."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from canopyq.errors import CanopyError

LENGTH = 512  # tokens that are taken of a text
ROWS = 8  # texts in a batch


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
    items = [data] if isinstance(data, (str, Tensor, Mapping)) else list(data) if isinstance(data, Iterable) else [data]
    if not items:
        raise CanopyError("the calibration data is empty; give batches of token ids (B, T), or texts with a tokenizer")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or None
    if all(isinstance(item, str) for item in items):
        batches = _from_texts(items, tokenizer, length, limit)
    else:
        batches = [_from_ids(item) for item in items]
    vocabulary = _vocabulary(model)
    for batch in batches:
        low, high = (int(end) for end in batch.ids.aminmax())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise CanopyError(
                f"calibration token {low if low < 0 else high} is not in the model's vocabulary of {vocabulary}; "
                "encode the data with the model's own tokenizer"
            )
        if limit is not None and batch.ids.shape[1] > limit:
            raise CanopyError(f"calibration rows of {batch.ids.shape[1]} tokens; the model takes {limit}, cut them")
    if not any(bool(batch.real.any()) for batch in batches):
        raise CanopyError("the calibration data is all padding; give rows with tokens")
    return batches


def _from_texts(texts: Sequence[str], tokenizer, length: int | None, limit: int | None) -> list[Batch]:
    """Texts of about the same length together, filled up at the right, where causal attention cannot see it."""
    if tokenizer is None:
        raise CanopyError("calibration takes batches of token ids (B, T), got str; tokenize the texts first, or pass "
                          "the tokenizer too")  # fmt: skip
    if not callable(getattr(tokenizer, "encode", None)) or isinstance(tokenizer, str):
        raise CanopyError(f"a {type(tokenizer).__name__} is no tokenizer; load the model's own with AutoTokenizer")
    if length is not None and (length < 1 or (limit is not None and length > limit)):
        raise CanopyError(f"calibration texts of {length} tokens do not fit the model's context of {limit}")
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


def _from_ids(item: object) -> Batch:
    if isinstance(item, Batch):
        return item
    mask = None
    if isinstance(item, Mapping):
        item, mask = item.get("input_ids"), item.get("attention_mask")
    if not isinstance(item, Tensor) or item.dim() != 2 or item.is_floating_point() or not item.numel():
        what = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
        raise CanopyError(f"calibration takes batches of token ids (B, T), got {what}; tokenize the texts first")
    if mask is None:
        return Batch(item.long(), torch.ones_like(item, dtype=torch.bool))
    if not isinstance(mask, Tensor) or mask.shape != item.shape:
        what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise CanopyError(f"an attention_mask has the shape of its ids {tuple(item.shape)}, got {what}")
    return Batch(item.long(), mask != 0)


def _vocabulary(model: nn.Module) -> int | None:
    """How many token ids the model knows; None if it does not say."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find() if find else None, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0]
    return getattr(getattr(model, "config", None), "vocab_size", None)
