"""The JSON of a checkpoint, which anybody may have written: read in an amount of memory known before."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from canopyq.errors import CanopyError, one_line

ROOM = 1_000_000  # bytes of JSON beside however few tensors
MOST_JSON = 100_000_000  # beside however many: what the safetensors library itself takes at most in a header
FEW = 10_000  # values; beyond them no more than one in so many bytes:
BYTES_PER_VALUE = 6  # JSON of tensors has about 10. An empty object has 3, and takes 72 in memory
DEEPEST = 64  # objects and lists in one another


def json_room(nbytes: int) -> int:
    """The bytes of JSON that a checkpoint may have in one file.

    Args:
        nbytes: of the files that hold its tensors. Parsed JSON takes some 10 times its own size, so that an eighth of
            them keeps loading within twice the checkpoint.
    """
    return min(ROOM + nbytes // 8, MOST_JSON)


def open_ordinary(path: Path) -> BinaryIO:
    """An ordinary file, opened to be read.

    Raises:
        CanopyError: for a folder, a device, or a pipe, on which reading could wait for ever.
        OSError: for a file that cannot be opened.
    """
    file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb", closefd=True)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CanopyError(f"{path} is no ordinary file; do not trust the folder that it is in")
    return file


def read_json(path: Path, most: int = ROOM, *, finite: bool = False) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Args:
        most: bytes that it may have; see `json_room`.
        finite: refuse NaN and infinity, which are no JSON, though Python writes and reads them.

    Raises:
        CanopyError: for a file that cannot be read, is no ordinary one, too large, too deep, or holds something else.
    """
    try:
        with open_ordinary(path) as file:
            raw = file.read(most + 1)
    except FileNotFoundError:
        raise CanopyError(f"{path.parent} has no {path.name}; name a folder written by save_pretrained") from None
    except OSError as error:
        raise CanopyError(f"{path} cannot be read ({error.strerror}); check its name and permissions") from None
    if len(raw) > most:
        raise CanopyError(f"{path} has more than {most:,} bytes, too many beside its tensors; download it again")
    return parse_json(raw, path, finite=finite)


def parse_json(raw: bytes, path: Path, *, finite: bool = False) -> dict[str, Any]:
    """A JSON object in which no key comes twice. Raises `CanopyError` for anything else; see `read_json`."""
    values = sum(map(raw.count, (b",", b"[", b"{")))  # those in texts, too: there are few
    if values > FEW + len(raw) // BYTES_PER_VALUE:
        raise CanopyError(f"{path} holds {values:,} values in {len(raw):,} bytes, too many for it; do not trust it")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key comes twice")
        return found

    def constant(name: str) -> float:
        if finite:
            raise ValueError(f"{name} is no number of JSON")
        return float(name)

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
        _raise_deep(content)
    except (ValueError, RecursionError) as error:
        raise CanopyError(f"{path} holds no valid JSON ({one_line(error)}); copy or download it again") from None
    if not isinstance(content, dict):
        raise CanopyError(f"{path} holds a JSON {type(content).__name__}, not an object; copy or download it again")
    return content


def _raise_deep(content: object) -> None:
    level = [content]
    for _ in range(DEEPEST):
        level = [x for held in level if isinstance(held, (dict, list)) for x in
                 (held.values() if isinstance(held, dict) else held)]  # fmt: skip
        if not level:
            return
    raise RecursionError(f"more than {DEEPEST} lists and objects in one another")
