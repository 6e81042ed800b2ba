"""Calibration data: whatever the caller has, as batches of token ids and which of them are real."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.errors import CanopyError, shown

LENGTH = 512  # tokens that are taken of a text
ROWS = 8  # texts in a batch
ADDED = ("labels", "token_type_ids", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping",
         "num_truncated_tokens", "overflowing_tokens")  # fmt: skip
MOST = 10**7  # tokens of a text


@dataclass(frozen=True)
class Batch:
    """Some samples side by side.

    Attributes:
        ids: (B, T) int64.
        real: (B, T) bool; False where padding fills a row up.
        more: what the model is called with beside them, such as ``decoder_input_ids`` or ``pixel_values``.
    """

    ids: Tensor
    real: Tensor
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """What a transformers model is called with."""
        mask = {} if bool(self.real.all()) else {"attention_mask": self.real.long()}
        return {"input_ids": self.ids} | mask | self.more


def read_batches(data: Any, model: nn.Module, tokenizer=None, length: int | None = None) -> list[Batch]:
    """Batches from any of three kinds of data, checked against the model before anything runs.

    Args:
        data: texts (with a ``tokenizer``); or batches of token ids (B, T); or what a tokenizer or a processor returns:
            ``input_ids``, an ``attention_mask`` that is 0 at pads, and whatever else the model takes; or `Batch`es.
        model: that the ids are for.
        tokenizer: of the model.
        length: every text has to have so many tokens and is cut there. None cuts at 512, or at the model's context if
            that is shorter, and takes shorter texts as they are.

    Raises:
        CanopyError: for no data, an empty text or one shorter than ``length``, ids that the model's vocabulary does
            not have, rows longer than its context, inputs that the model does not take, and anything that is none of
            the three.
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
    rows = [torch.tensor(_encoded(text, tokenizer)[:most], dtype=torch.int64) for text in texts]
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


def _encoded(text: str, tokenizer) -> list[int]:
    """The tokens of a text, with one BOS where a chat template has written one and the tokenizer puts another before
    it."""
    ids, first = tokenizer.encode(text), getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if first is not None and ids[:2] == [first, first] else ids


def _pad(rows: list[Tensor]) -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([[len(row)] for row in rows])
    return Batch(ids, torch.arange(ids.shape[1]) < lengths)


def _from_ids(item: object, model: nn.Module) -> Batch:
    if isinstance(item, Batch):
        return item
    mask, more = None, {}
    if isinstance(item, Mapping):
        more = {name: value for name, value in item.items() if name not in ("input_ids", "attention_mask")}
        item, mask = item.get("input_ids"), item.get("attention_mask")
    ids = checks.tokens("the calibration data", item, model).long()
    more = _taken(more, model)
    if mask is None:
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool), more)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise CanopyError(f"attention_mask is {shown(mask)}; give it the shape of its ids {tuple(ids.shape)}")
    return Batch(ids, checks.with_values("attention_mask", mask) != 0, more)


def _taken(more: dict[Any, Any], model: nn.Module) -> dict[str, Any]:
    """Inputs beside ids and mask that the model takes. What tokenizers add for others, and labels, which change nothing
    that a layer sees, are left out; all else that it does not name is refused."""
    names = signature(model.forward).parameters
    if isinstance(inner := getattr(model, "get_base_model", lambda: None)(), nn.Module):  # of peft
        names = signature(inner.forward).parameters
    wrong = [name for name in more if name not in names and name not in ADDED]
    if wrong:
        raise CanopyError(
            f"the calibration data has {shown(wrong[0])}, which {type(model).__name__} does not take; leave it out"
        )
    return {name: value for name, value in more.items() if name in names and name != "labels"}


def _takes_ids(model: nn.Module) -> bool:
    return any(isinstance(part, nn.Embedding) for part in model.modules())
