"""Writing a safetensors file tensor by tensor, so that no more than one of them is ever in memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from canopyq.checkpoint.files import raise_not_finite, sync
from canopyq.checkpoint.header import DTYPES, TensorInfo

NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 2**23  # bytes copied from file to file at a time
METADATA = {"format": "pt"}  # without it transformers refuses the file


class Writer:
    """A safetensors file whose tensors are all known by dtype and shape before the first is written.

    They may come in any order; each goes to its own place in the file. Under its name the file appears only when
    `finish` has brought all of it to the disk, else not at all.

    Args:
        path: of the file.
        tensors: name -> (dtype, shape) of every tensor that will be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self.dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
        self.shapes = {name: tuple(shape) for name, (_, shape) in tensors.items()}
        self.places = _places(tensors)
        self.missing = set(tensors)
        self.header_bytes: int | None = None
        self._header()
        self.file = open(self.part, "wb", buffering=0)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file, or remove what there is of it."""
        try:
            if kind is None:
                self.finish()
        finally:
            self.file.close()
            self.part.unlink(missing_ok=True)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place. Its dtype may differ from the one announced if it takes as many bytes."""
        if tuple(tensor.shape) != self.shapes[name] or tensor.dtype.itemsize != self.dtypes[name].itemsize:
            raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was announced")
        self.dtypes[name] = tensor.dtype
        self._seek(name)
        if tensor.numel():
            write(self.file, memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))

    def copy(self, name: str, source: Path, info: TensorInfo) -> None:
        """Copy a tensor as it is from another safetensors file, in small blocks.

        Raises:
            CanopyError: for NaN and infinity.
            OSError: if that cannot be done.
        """
        self._seek(name)
        with open(source, "rb", buffering=0) as file:
            file.seek(info.start)
            left = info.nbytes
            while left:
                block = file.read(min(BLOCK, left))
                if len(block) < min(BLOCK, left):
                    raise OSError(5, f"the file ended early while {name} was copied; was it changed meanwhile?", source)
                raise_not_finite(torch.frombuffer(bytearray(block), dtype=info.torch_dtype), name)
                write(self.file, memoryview(block))
                left -= len(block)

    def finish(self) -> None:
        """Write the header, wait for the disk, and give the file its name."""
        if self.missing:
            raise AssertionError(f"{sorted(self.missing)[0]} was announced and never written")
        self.file.seek(0)
        write(self.file, memoryview(self._header()))
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.part, self.path)
        sync(self.path.parent)

    def _seek(self, name: str) -> None:
        self.missing.remove(name)
        self.file.seek(self.header_bytes + self.places[name][0])

    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": METADATA}
        for name, place in self.places.items():
            entries[name] = {"dtype": NAMES[self.dtypes[name]], "shape": self.shapes[name], "data_offsets": place}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        if self.header_bytes is None:  # data begins at a multiple of 8; a letter to spare where F16 may become BF16
            spare = sum(dtype == torch.float16 for dtype in self.dtypes.values())
            self.header_bytes = 8 + -(-(len(text) + spare) // 8) * 8
        return struct.pack("<Q", self.header_bytes - 8) + text.ljust(self.header_bytes - 8)


def _places(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, tuple[int, int]]:
    """Where each tensor begins and ends. Wide dtypes come first, so that every tensor is aligned to its own width."""
    places, position = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        end = position + torch.Size(shape).numel() * dtype.itemsize
        places[name] = (position, end)
        position = end
    return places


def write(file, block: memoryview) -> None:
    """All of a block: the system may take less of it at a time."""
    while block:
        block = block[file.write(block) :]
