"""The header of a safetensors file, checked before a byte of it is trusted."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from canopyq.checkpoint.json_files import json_room, open_ordinary, parse_json
from canopyq.errors import CanopyError, shown, unknown

MOST_ELEMENTS = 2**60

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


class Header(dict[str, TensorInfo]):
    """The tensors of a safetensors file by name, in the file's order; ``metadata`` is its free text."""

    metadata: dict[str, str]


def read_header(path: Path | str) -> Header:
    """The header of a safetensors file, checked against the file without reading any tensor.

    Raises:
        CanopyError: unless the header is what the format demands: JSON of a size that fits, known dtypes, shapes whose
            bytes agree with the offsets, and tensors that fill the file without gap or overlap.
    """
    path = Path(path)
    try:
        with open_ordinary(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise CanopyError(f"{path} has {size} bytes, too few for safetensors; copy or download it again")
            (length,) = struct.unpack("<Q", file.read(8))
            if length > json_room(size) or 8 + length > size:
                raise CanopyError(
                    f"{path} announces a header of {length:,} bytes in a file of {size:,}: it is cut short or no "
                    "safetensors file; copy or download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CanopyError(f"{path} cannot be read ({error.strerror}); check its name and permissions") from None
    entries = parse_json(raw, path)
    header = Header()
    header.metadata = _metadata(entries.pop("__metadata__", {}), path)
    for name, entry in entries.items():
        header[name] = _tensor_info(name, entry, 8 + length, path)
    _check_layout(header, 8 + length, size, path)
    return header


def _metadata(content: object, path: Path) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise CanopyError(f"{path}: __metadata__ is no map of texts; write the file again with safetensors")
    return content


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _tensor_info(name: str, entry: object, data: int, path: Path) -> TensorInfo:
    where, cure = f"{path}: tensor {shown(name)}", "copy or download the file again"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CanopyError(f"{where} is not described by dtype, shape and data_offsets; {cure}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise unknown(f"dtype of {where}", dtype if isinstance(dtype, str) else type(dtype).__name__, DTYPES)
    if not isinstance(shape, list) or not all(_is_count(n, MOST_ELEMENTS) for n in shape):
        raise CanopyError(f"{where} has the shape {shown(shape)}, which no tensor has; {cure}")
    elements = 0 if 0 in shape else 1
    for n in shape:  # never a number of a million digits
        elements *= n
        if elements > MOST_ELEMENTS:
            raise CanopyError(f"{where} has the shape {shown(shape)}, more than 2^60 values; {cure}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n, 2**63) for n in offsets):
        raise CanopyError(f"{where} has the offsets {shown(offsets)}, which are none; {cure}")
    start, end = offsets
    if end - start != (nbytes := elements * DTYPES[dtype].itemsize):
        raise CanopyError(f"{where} has {end - start:,} bytes, but {dtype} {tuple(shape)} takes {nbytes:,}; {cure}")
    return TensorInfo(dtype, tuple(shape), data + start, data + end)


def _check_layout(header: Header, data: int, size: int, path: Path) -> None:
    """Tensors follow one another from the end of the header to the end of the file, as the format demands."""
    position = data
    for name, info in sorted(header.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            problem = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise CanopyError(f"{path}: tensor {shown(name)} {problem}; copy or download the file again")
        position = info.end
    if position != size:
        raise CanopyError(
            f"{path} has {size:,} bytes and its header describes {position:,}; it is cut short or damaged: "
            "copy or download it again"
        )
