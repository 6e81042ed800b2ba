"""The tutor's tokenizer: byte-pair encoding (BPE) with single digits, built from the generated chats themselves.

A text is first cut into pieces (one digit, one hyphen, a word with the space before it …); BPE merges letters only
inside a piece. Single digits let the model do column arithmetic, and single hyphens keep spelled-out words one letter a
token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from canopyq.tutor import stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

VOCABULARY = 1280
CONTEXT = 2048
SPECIALS = ("<pad>", "<bos>", "<user>", "<bot>", "<end>")
PAD, BOS, USER, BOT, END = range(len(SPECIALS))

# One alternative takes every character, so the pieces joined are the text. No feature in it differs between Python's
# engine and the tokenizer's, so both cut alike.
PIECES = r"[0-9]|-|'s| ?[A-Za-z]+| ?[^A-Za-z0-9 -]+| "

# <bos><user>question<bot>answer<end><user>question<bot>…
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] + '<bot>' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def build(chats: int = 6000, turns: int = 10) -> Tokenizer:
    """Learn the merges from ``chats`` generated training chats of ``turns`` turns."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        rng = Random("tokenizer")
        for _ in range(chats):
            for question, answer in islice(stream.chat(rng), turns):
                yield question
                yield answer

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def write_files(tokenizer: Tokenizer, folder: Path) -> None:
    """The two files that ``transformers.AutoTokenizer`` reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[END],
        "pad_token": SPECIALS[PAD],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers reads it from its two files."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


class CachedEncoder:
    """Text to token ids as the tokenizer does it, remembering every piece: training meets the same ones again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cut = re.compile(PIECES).findall
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._cut(text):
            tokens = self._known.get(piece)
            if tokens is None:
                tokens = self._known[piece] = self._tokenizer.encode(piece, add_special_tokens=False).ids
            ids += tokens
        return ids
