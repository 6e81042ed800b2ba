"""A checkpoint's files, which anybody may have written: tensors read one by one, JSON in memory known before."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from canopyq.checkpoint.headers import DTYPES, TensorInfo, json_room, read_header, read_json
from canopyq.errors import CanopyError, shown, unknown, wrapped

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
LONGEST_NAME = 255  # characters of a tensor's
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


_SPELLED = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Derived:
    """A tensor that is made of others of a checkpoint when it is read.

    Attributes:
        read: gives it, or the part at an index of its first dimension.
        of: the names of what it is made of.
        room: bytes that making all of it takes beside it.
        in_parts: whether making a part of it takes that part of the room.
    """

    read: Callable[[int | None], Tensor]
    dtype: torch.dtype
    shape: tuple[int, ...]
    of: tuple[str, ...]
    room: int
    in_parts: bool = True


@dataclass
class Checkpoint:
    """A folder with a config.json and safetensors, one file or several with an index.

    Nothing but headers is read until `read` is called.

    Attributes:
        folder: where it lies.
        config: the content of config.json.
        tensors: name -> (file, `TensorInfo`), file by file in the files' order.
        in_files: name -> what the file calls the tensor, if that is another name; see `renamed`.
        derived: name -> how a tensor is made that no file holds; see `deriving`.
        nbytes: of all tensors in the files.

    Raises:
        CanopyError: for a folder that holds no such checkpoint, pickled weights, damaged files, an index that names
            files outside the folder or that do not exist, a tensor that two files hold.
    """

    folder: Path
    config: dict[str, Any] = field(init=False)
    tensors: dict[str, tuple[Path, TensorInfo]] = field(init=False, default_factory=dict)
    in_files: dict[str, str] = field(init=False, default_factory=dict)
    derived: dict[str, Derived] = field(init=False, default_factory=dict)
    nbytes: int = field(init=False)

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
        self.nbytes = sum(info.nbytes for _, info in self.tensors.values())

    @property
    def quantization(self) -> object:
        """What config.json says of quantized weights; None if it says nothing."""
        return self.config.get("quantization_config", self.config.get("compression_config"))

    @property
    def files(self) -> list[Path]:
        """The safetensors files, each once, in the order of their names."""
        return sorted({file for file, _ in self.tensors.values()})

    @property
    def json_room(self) -> int:
        """The bytes that a JSON file of it may have."""
        return _json_room(self.folder)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same checkpoint with other names for tensors. ``names``: name in the files -> another, held by none."""
        other = copy(self)
        other.tensors = {names.get(name, name): held for name, held in self.tensors.items()}
        other.in_files = {new: name for name, new in names.items()}
        other.derived = {names.get(name, name): how for name, how in self.derived.items()}
        return other

    def deriving(self, derived: Mapping[str, Derived], without: Iterable[str]) -> Checkpoint:
        """The same checkpoint with tensors that are made of those that it has, and without some of them."""
        other, gone = copy(self), set(without)
        other.derived = self.derived | derived
        other.tensors = {name: held for name, held in self.tensors.items() if name not in gone}
        for name, how in derived.items():
            file, first = self.tensors[how.of[0]]
            nbytes = math.prod(how.shape) * how.dtype.itemsize
            info = TensorInfo(_SPELLED[how.dtype], tuple(how.shape), first.start, first.start + nbytes)
            other.tensors[name] = (file, info)
        return other

    def room(self, name: str, parts: int = 1) -> int:
        """Bytes that reading a tensor takes beside it, or one of ``parts`` equal ones along its first dimension."""
        if (how := self.derived.get(name)) is None:
            return 0
        return how.room // parts if how.in_parts else how.room + self.tensors[name][1].nbytes * (parts > 1)

    def read(self, name: str, at: int | None = None) -> Tensor:
        """One tensor, mapped from the file: its pages are read when they are used, and given back with the tensor.

        Args:
            at: only this part of it, along its first dimension.
        """
        if name not in self.tensors:
            raise unknown("tensor", name, list(self.tensors)[:10], more=", …")
        if (how := self.derived.get(name)) is not None:
            return how.read(at)
        file, _ = self.tensors[name]
        with wrapped(
            f"{file}: tensor {shown(name)} cannot be read", "was the file changed meanwhile?"
        ):  # safetensors has its own exception, the system others
            # Opened anew each time: as long as a mapping lives, all that was read through it counts as memory in use.
            with safe_open(file, framework="pt") as opened:
                own = self.in_files.get(name, name)
                return opened.get_tensor(own) if at is None else opened.get_slice(own)[at]


class Reader:
    """`Checkpoint.read`, without opening the file for each tensor; now and then, so that what was read is let go."""

    MOST = 2**26

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.file: Path | None = None
        self.opened, self.bytes = None, 0

    def __call__(self, name: str) -> Tensor:
        file, info = self.checkpoint.tensors[name]
        with wrapped(f"{file}: tensor {shown(name)} cannot be read", "copy or download it again"):
            if file != self.file or self.bytes + info.nbytes > self.MOST:
                self.opened = None  # the old mapping goes before the new one comes
                self.opened, self.file, self.bytes = safe_open(file, framework="pt"), file, 0
            self.bytes += info.nbytes
            return self.opened.get_tensor(self.checkpoint.in_files.get(name, name))


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
    if folder.suffix == ".gguf" and not folder.is_dir():
        raise CanopyError(f"{shown(str(folder))} is a GGUF file, which cq.load_gguf reads; quantize what it gives")
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
