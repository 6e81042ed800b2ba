"""A checkpoint's files: tensors read one by one, output folders that are whole or absent."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from canopyq.checkpoint.header import DTYPES, Header, TensorInfo, read_header
from canopyq.checkpoint.json_files import json_room, read_json
from canopyq.errors import CanopyError, one_line, shown, unknown

__all__ = ["CONFIG", "DTYPES", "GENERATION", "INDEX", "SINGLE", "Checkpoint", "Header", "TensorInfo", "as_path",
           "raise_not_finite", "read_header", "read_json", "refuse_not_empty", "whole_or_absent", "move_into_place",
           "sync"]  # fmt: skip

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
LONGEST_NAME = 255  # characters of a tensor's
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass
class Checkpoint:
    """A folder with a config.json and safetensors, one file or several with an index.

    Nothing but headers is read until `read` is called.

    Attributes:
        folder: where it lies.
        config: the content of config.json.
        tensors: name -> (file, `TensorInfo`), file by file in the files' order.

    Raises:
        CanopyError: for a folder that holds no such checkpoint, pickled weights, damaged files, an index that names
            files outside the folder or that do not exist, a tensor that two files hold.
    """

    folder: Path
    config: dict[str, Any] = field(init=False)
    tensors: dict[str, tuple[Path, TensorInfo]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = as_path(self.folder)
        files, weight_map = _shards(self.folder)
        self.config = read_json(self.folder / CONFIG, self.json_room)
        for file in files:
            for name, info in read_header(file).items():
                if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
                    raise CanopyError(f"{file}: {shown(name)} is no name of a tensor; do not trust the file")
                if name in self.tensors:
                    other = self.tensors[name][0].name
                    raise CanopyError(f"{file}: tensor {shown(name)} is in {other} too; download the checkpoint again")
                self.tensors[name] = (file, info)
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name][0].name != file:
                raise CanopyError(f"{INDEX} says that {file} holds {shown(name)}, and it does not; download both again")

    @property
    def files(self) -> list[Path]:
        """The safetensors files, each once, in the order of their names."""
        return sorted({file for file, _ in self.tensors.values()})

    @property
    def json_room(self) -> int:
        """The bytes that a JSON file of it may have."""
        return _json_room(self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for _, info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file: its pages are read when they are used, and given back with the tensor."""
        if name not in self.tensors:
            raise unknown("tensor", name, list(self.tensors)[:10], more=", …")
        file, _ = self.tensors[name]
        try:
            # Opened anew each time: as long as a mapping lives, all that was read through it counts as memory in use.
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except CanopyError:
            raise
        except Exception as error:  # safetensors has its own exception, the system others
            raise CanopyError(
                f"{file}: tensor {shown(name)} cannot be read ({one_line(error)}); was the file changed meanwhile?"
            ) from None


def raise_not_finite(tensor: Tensor, name: str) -> None:
    """Raise `CanopyError` for NaN or infinity in a tensor of a checkpoint: the model would answer nothing else.

    It takes no memory: the smallest and the largest value tell.
    """
    if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
        if not all(bool(x.isfinite()) for x in tensor.aminmax()):
            raise CanopyError(f"{shown(name)} holds NaN or infinity in {tensor.dtype}; write the file again")


def as_path(folder: str | Path) -> Path:
    """What a caller named as a folder; ``~`` is the home.

    Raises:
        CanopyError: for what cannot be a path.
    """
    if not isinstance(folder, (str, os.PathLike)) or "\0" in os.fspath(folder):
        raise CanopyError(f"{shown(folder)} ({type(folder).__name__}) names no folder; use a text such as 'out/w4'")
    path = Path(os.path.expanduser(folder))
    try:
        too_long = [part for part in path.parts if len(os.fsencode(part)) > 255 - len(".partial")]
    except UnicodeEncodeError:
        raise CanopyError(f"{shown(str(folder))} is no text that names a folder; use one such as 'out/w4'") from None
    if too_long:
        raise CanopyError(f"{too_long[0][:60]}… has {len(too_long[0])} characters, too many for a folder; shorten it")
    return path


def _shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The checkpoint's safetensors files, and tensor name -> file name as the index has it (empty without one)."""
    if folder.suffix in PICKLES and not folder.is_dir():
        raise CanopyError(_never_unpickled(folder))
    if not folder.is_dir():
        raise CanopyError(f"{shown(str(folder))} is no folder; name one with a config.json and safetensors files")
    if (folder / SINGLE).is_file():  # transformers, too, takes it before an index
        return [folder / SINGLE], {}
    if not (folder / INDEX).is_file():
        if pickles := sorted(file for file in folder.iterdir() if file.suffix in PICKLES):
            raise CanopyError(_never_unpickled(pickles[0]))
        raise CanopyError(f"{folder} has neither {SINGLE} nor {INDEX}; name a folder written by save_pretrained")
    weight_map = read_json(folder / INDEX, _json_room(folder)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CanopyError(f"{folder / INDEX} has no weight_map of tensors to files; download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if (
            name in ("", ".", "..")
            or any(c in name for c in "/\\")
            or not name.isprintable()
            or len(name.encode()) > 255
        ):
            raise CanopyError(f"{folder / INDEX} names {shown(name)}, which is no file of its folder; do not trust it")
        if not (folder / name).is_file():
            raise CanopyError(f"{folder / INDEX} names {shown(name)}, which is missing; download the checkpoint again")
    return [folder / name for name in names], weight_map


def _json_room(folder: Path) -> int:
    return json_room(sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file()))


def _never_unpickled(file: Path) -> str:
    return (
        f"{file} is a pickle, and reading a pickle runs whatever code is in it, so canopyq never does; load it where "
        "you trust it and write it again by model.save_pretrained(folder)"
    )


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
