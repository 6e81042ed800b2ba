"""Headers of safetensors files, and JSON: how much of either is read is bounded by what it belongs to."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from canopyq.errors import CanopyError, shown, unknown, wrapped

LFS_POINTER = b"version https://git-lfs"
ROOM = 1_000_000  # bytes of JSON beside however few tensors
MOST_JSON = 100_000_000  # beside however many: what the safetensors library itself takes at most in a header
FEW = 10_000  # values; beyond them no more than one in so many bytes:
BYTES_PER_VALUE = 6  # JSON of tensors has about 10. An empty object has 3, and takes 72 in memory
DEEPEST = 64  # objects and lists in one another
_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, kind) for name, kind in _NAMES.items() if hasattr(torch, kind)}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: its dtype as safetensors spells it, and the bytes of the file that it fills."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@contextmanager
def _mapped(path: Path, size: int) -> Iterator[Any]:
    """An opened safetensors file. One of holes may be larger than what a process can map."""
    try:
        opened = safe_open(path, framework="pt")
    except (OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or "os error 12" in str(error) or error.errno == errno.ENOMEM:
            raise CanopyError(f"{path} has {size:,} bytes, more than this process may map; is that its size?") from None
        raise
    with opened:
        yield opened


def read_header(path: Path | str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in its order. The library checks the header: known dtypes, and shapes whose
    bytes fill the file without gap or overlap.

    Its size is bounded first. The library takes any of up to 100 MB, and the memory of parsing it.

    Raises:
        CanopyError: for a file that the library refuses, or with a header out of proportion.
    """
    path = Path(path)
    with wrapped(f"{path} cannot be read", "copy or download it again", OSError, SafetensorError):
        with open_ordinary(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == LFS_POINTER[:8] and size < 1024:
            raise CanopyError(f"{path} is a Git LFS pointer, which stands for the weights; fetch them by git lfs pull")
        if length > json_room(size):
            raise CanopyError(f"{path} announces a header of {length:,} bytes in a file of {size:,}; do not trust it")
        header: dict[str, TensorInfo] = {}
        end = 8 + length
        with _mapped(path, size) as opened:
            for name in opened.offset_keys():
                tensor = opened.get_slice(name)
                dtype, shape, start = tensor.get_dtype(), tuple(tensor.get_shape()), end
                if dtype not in DTYPES:
                    raise unknown(f"dtype of {path}: tensor {shown(name)}", dtype, DTYPES)
                end += math.prod(shape) * DTYPES[dtype].itemsize
                header[name] = TensorInfo(dtype, shape, start, end)
    return header


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

    with wrapped(f"{path} holds no valid JSON", "copy or download it again", ValueError, RecursionError):
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
        _raise_deep(content)
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
