"""Text of the caller's own: read from files, and cut into windows of tokens that a model can be run on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.checkpoint.files import as_path
from canopyq.errors import CanopyError, shown, wrapped

LENGTH = 512  # tokens of a window
SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl")
FIELD = "text"  # of each line of JSONL
PIECE = 2**20  # characters that are made tokens at a time: of a long text most are not needed


def read_texts(path: str | Path) -> list[str]:
    """The text in a file, or in the files of a folder that end in `SUFFIXES`, in the order of their names.

    Args:
        path: of a file of JSONL, an object a line, its field ``text`` is read; ``file.jsonl:field`` names another.

    Raises:
        CanopyError: for a file that is not there or not UTF-8, a folder without such files, JSONL without the field,
            and nothing but blanks.
    """
    path = as_path(path)
    whole, _, field = str(path).rpartition(":")
    if whole.lower().endswith(".jsonl") and not path.exists():
        path = Path(whole)
    else:
        field = FIELD
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise CanopyError(f"{path} holds no file of text, whose name ends in {', '.join(SUFFIXES)}; name one")
    texts = [text for file in files for text in _read(file, field)]
    if not (texts := [text for text in texts if text.strip()]):
        raise CanopyError(f"{path} holds no text; name a file with some pages of it, in UTF-8")
    return texts


def _read(file: Path, field: str) -> list[str]:
    with wrapped(f"{file} cannot be read as text in UTF-8", "", OSError, UnicodeDecodeError):
        content = file.read_text(encoding="utf-8-sig")
    if file.suffix.lower() != ".jsonl":
        return [content]
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [_field(line, field, file, number) for number, line in lines]


def _field(line: str, field: str, file: Path, number: int) -> str:
    """The text of a field in a line of JSONL."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise CanopyError(f"{file}, line {number}, is no JSON; give an object a line, or plain text") from None
    if isinstance(found, dict) and isinstance(found.get(field), str):
        return found[field]
    fields = [name for name, value in found.items() if isinstance(value, str)] if isinstance(found, dict) else []
    raise CanopyError(
        f"{file}, line {number}, has no text in a field {shown(field)}"
        + (f", but in {', '.join(map(shown, fields[:5]))}; name one as {file}:{fields[0]}" if fields
           else "; give an object a line, with a field of text")
    )  # fmt: skip


def windows(
    text: str | Sequence[str], tokenizer: Any, model: nn.Module, *, tokens: int, length: int | None = None
) -> list[Tensor]:
    """The beginning of a text as windows of token ids (1, length) that do not overlap.

    Each window begins with the tokenizer's BOS, or with its EOS where it has none, as lm-eval does it; where it has
    neither, all of a window is text. What is left at the end and fills no window is not used.

    Args:
        text: one, or several, which are joined by blank lines.
        tokens: at most so many are used, BOS included.
        length: of a window. None takes 512, or the model's context if that is shorter.

    Raises:
        CanopyError: for a text that fills no window, a length beyond the model's context, fewer tokens than one window,
            and tokens that the model does not know.
    """
    checks.tokenizer(tokenizer)
    limit = checks.context(model)
    if length is None:
        length = min(LENGTH, limit or LENGTH)
    checks.count("length", length, 2, limit or 10**9), checks.count("tokens", tokens, 1)
    if tokens < length:
        raise CanopyError(f"tokens={tokens} is less than a window of {length}; ask for more, or for shorter windows")
    joined = text if isinstance(text, str) else "\n\n".join(checks.text("text", part) for part in _parts(text))
    first = [begin] if (begin := beginning(tokenizer)) is not None else []
    most, step = tokens // length, length - len(first)
    ids: list[int] = []
    for start in range(0, len(joined), PIECE):
        ids += tokenizer.encode(joined[start : start + PIECE], add_special_tokens=False, verbose=False)
        if len(ids) >= most * step:
            break
    if len(ids) < step:
        raise CanopyError(
            f"the text has {len(ids)} tokens and fills no window of {step}; give more text, or shorter windows"
        )
    count = min(most, len(ids) // step)
    made = [torch.tensor([first + ids[n * step : (n + 1) * step]]) for n in range(count)]
    checks.tokens("the text", torch.cat(made), model)
    return made


def beginning(tokenizer: Any) -> int | None:
    """The token that a text begins with: BOS, or else EOS, or none."""
    ids = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((token for token in ids if token is not None), None)


def _parts(text: object) -> list:
    return checks.sequence("text", text, 1)
