"""The hidden folder in which long work grows: found again after an interruption, renamed when it is whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from canopyq.checkpoint.files import CONFIG, Checkpoint, as_path, move_into_place, read_json, refuse_not_empty
from canopyq.disk import write_atomic
from canopyq.errors import CanopyError

MANIFEST, LOCK, MODEL = "manifest.json", "lock", "model"
OURS = (MANIFEST, f".{MANIFEST}.*.part", LOCK, MODEL)


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
            header = opened.read(min(info.start for other, info in source.tensors.values() if other == file))
        found[file.name] = f"{stat.st_size} {stat.st_mtime_ns} {hashlib.sha256(header).hexdigest()}"
    return found
