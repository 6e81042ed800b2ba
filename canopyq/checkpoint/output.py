"""Folders that are whole or absent: written beside their place, brought to the disk, and renamed."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from canopyq.checkpoint.files import CONFIG, Checkpoint, as_path, raise_not_finite
from canopyq.checkpoint.headers import DTYPES, TensorInfo, read_json
from canopyq.disk import write_atomic
from canopyq.errors import CanopyError

MANIFEST, LOCK, MODEL = "manifest.json", "lock", "model"
OURS = (MANIFEST, f".{MANIFEST}.*.part", LOCK, MODEL)
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 2**23  # bytes copied from file to file at a time
METADATA = {"format": "pt"}  # without it transformers refuses the file


def refuse_not_empty(folder: Path | str) -> None:
    """Raise `CanopyError` unless a checkpoint can be written there: ``folder`` is absent, or an empty folder."""
    folder = Path(os.path.realpath(as_path(folder)))
    if folder.exists() and not folder.is_dir():
        raise CanopyError(f"{folder} is a file; name a folder that does not exist yet")
    above = next(path for path in (folder.parent, *folder.parent.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise CanopyError(f"{folder} cannot be made: {above} is not a folder that you may write to; name another")
    if folder.is_dir() and next(folder.iterdir(), None) is not None:
        raise CanopyError(f"{folder} is not empty; name a folder that does not exist yet, or empty it first")
    if folder.is_dir() and folder.samefile(os.curdir):  # a new folder takes its place, and this process is in the old
        raise CanopyError(f"{folder} is the current folder; name one in it or beside it")


@contextmanager
def whole_or_absent(folder: Path | str) -> Iterator[Path]:
    """A new hidden folder beside ``folder``, to write into. It takes that name at the end, or is removed on failure.

    Everything is on the disk before the name is given, so that after a power cut, too, ``folder`` is whole or absent.
    What earlier runs left that were killed is removed first; what another process is still writing stays.

    Raises:
        CanopyError: if ``folder`` exists and is not empty.
    """
    refuse_not_empty(folder)
    folder = Path(os.path.realpath(as_path(folder)))
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 8}.part"):
        if (held := _hold(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)
    held = work = None
    while work is None or not work.exists():  # another process may take it for a leftover before it is locked
        work = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
        work.mkdir(parents=True)
        held = _hold(work)
    try:
        yield work
        move_into_place(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        if held is not None:
            os.close(held)


def _hold(folder: Path) -> int | None:
    """Lock a folder for this process; the system lets the lock go when the process ends, however it does. None if
    another process has it, if it is no folder, or if its disk has no locks."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), os.stat(folder)):
            return held
    except OSError:  # held by another process, or gone
        pass
    os.close(held)
    return None


def move_into_place(work: Path, folder: Path) -> None:
    """Write everything below ``work`` to the disk itself, then rename it to ``folder`` (absent, or an empty folder)."""
    refuse_not_empty(folder)
    for path in [*work.rglob("*"), work]:
        sync(path)
    os.replace(work, folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Work:
    """``.DIR.partial`` beside the folder DIR that it becomes.

    It holds the files finished so far in ``model``, and a manifest: what they are made from, and which are finished.

    Args:
        out: DIR.
        terms: what the result depends on. Files finished on other terms are of no use.
    """

    def __init__(self, out: Path | str, terms: dict[str, object]) -> None:
        refuse_not_empty(out)
        self.out = Path(os.path.realpath(as_path(out)))
        self.folder = self.out.with_name(f".{self.out.name}.partial")
        self.model = self.folder / MODEL
        self.terms = json.loads(json.dumps(terms))
        self.finished: dict[str, int] = {}
        self.changed: list[str] = []
        self._look()

    def _look(self) -> None:
        """Read what an earlier run left, if it did. Nothing is written."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir() or not all(
            any(entry.match(pattern) for pattern in OURS) for entry in self.folder.iterdir()
        ):
            raise CanopyError(f"{self.folder} is where the work goes, and it holds other things; move it away")
        try:
            found = read_json(self.folder / MANIFEST)
            terms, finished = dict(found["terms"]), {str(name): int(size) for name, size in found["finished"].items()}
        except (CanopyError, KeyError, TypeError, ValueError, AttributeError):
            self.changed = ["its manifest is missing"]
            return
        self.changed = [f"the {name} differs" for name in self.terms if terms.get(name) != self.terms[name]]
        if not self.changed:
            self.finished = {name: size for name, size in finished.items() if self._has(name, size)}

    def _has(self, name: str, size: int) -> bool:
        file = self.model / name
        return file.is_file() and file.stat().st_size == size

    def check_space(self, needed: int) -> None:
        """Raise `CanopyError` unless the disk has room for ``needed`` more bytes. Nothing is written."""
        above = next(path for path in self.out.parents if path.exists())
        free = shutil.disk_usage(above).free
        if self.folder.exists():  # leftovers that will be removed
            useless = [p for p in self.folder.rglob("*") if p.is_file() and p.name not in self.finished]
            free += sum(path.stat().st_size for path in useless)
        if needed > free:
            raise CanopyError(
                f"{self.out} needs {needed:,} bytes and the disk has {free:,} free; make room, or name a folder "
                "on another disk"
            )

    @contextmanager
    def open(self) -> Iterator[Path]:
        """The folder to write into, for this process alone. It stays if the work is interrupted."""
        self.model.mkdir(parents=True, exist_ok=True)
        with open(self.folder / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CanopyError(f"another process is writing {self.out} already; wait for it, or end it") from None
            refuse_not_empty(self.out)
            for file in self.model.iterdir():
                if file.name not in self.finished:
                    file.unlink()
            self._write_manifest()
            yield self.model

    def finish(self, name: str) -> None:
        """Note that a file of ``model`` is on the disk and need not be made again."""
        self.finished[name] = (self.model / name).stat().st_size
        self._write_manifest()

    def become(self) -> None:
        """All is done: ``model`` takes the name DIR, and the rest is removed."""
        move_into_place(self.model, self.out)
        self.remove()

    def remove(self) -> None:
        """Remove the folder: what is in it is of no use to anybody."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_manifest(self) -> None:
        content = json.dumps({"terms": self.terms, "finished": self.finished}, indent=1)
        write_atomic(self.folder / MANIFEST, content.encode())


def fingerprint(source: Checkpoint) -> dict[str, str]:
    """What tells that a checkpoint changed: its config, and every file's header, size and time of change."""
    found = {CONFIG: hashlib.sha256((source.folder / CONFIG).read_bytes()).hexdigest()}
    for file in source.files:
        stat = file.stat()
        with file.open("rb") as opened:
            header = opened.read(8 + int.from_bytes(opened.read(8), "little"))
        found[file.name] = f"{stat.st_size} {stat.st_mtime_ns} {hashlib.sha256(header).hexdigest()}"
    return found


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
